"""The part of OpenAI's API we serve, with vLLM's extensions: completions, chat completions, models, tokens."""
