"""Self-supervised learning without collapse: one trainer, one file for each method."""
