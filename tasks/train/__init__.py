"""Training: the programs that move weights."""
