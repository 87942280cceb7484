"""Checkpoints for engines that know nothing of kvlatent, and the one place that says which engine can hold what."""
