"""The server: OpenAI's API over an engine that runs onebit artifacts, and jobs that make them."""
