"""Perplexity, needle, tasks, benchmark, and the report about them."""
