"""Adapters: scales for the outputs of quantized layers, learned from a user's text; small, and many share a model."""
