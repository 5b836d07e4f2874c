"""What a compressed model lost: perplexity, divergence from its original, and the page that shows it."""
