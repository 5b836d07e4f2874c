"""The story of a quantization: configuration, plan, run, resume."""
