"""The only part of the project that speaks HTTP."""
