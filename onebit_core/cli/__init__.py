"""The `onebit` command."""
