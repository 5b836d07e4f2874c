"""A finished model on disk: what it is, how it is written, how it is read."""
