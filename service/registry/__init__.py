"""Which artifacts are served, under which names, and who holds them."""
