"""Serving with the engines people run: the vLLM plugin and the launcher."""
