"""The part of OpenAI's API we serve: completions, chat completions, models."""
