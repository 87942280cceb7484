"""Text: sources, token blocks, positions, and what a teacher writes itself."""
