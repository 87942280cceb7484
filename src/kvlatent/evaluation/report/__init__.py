"""What was measured, for people: an HTML page, plain text for a terminal, and a model card."""
