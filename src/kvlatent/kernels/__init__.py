"""Decode attention on CPUs and GPUs, and what chooses between them."""
