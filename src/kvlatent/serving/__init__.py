"""Engines: exports, the vLLM plugin, launching a server, and what runs where."""
