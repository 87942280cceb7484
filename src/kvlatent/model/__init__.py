"""The model: spec, families, attention, cache, and checkpoints in and out."""
