"""Teacher to student: statistics, budget, reductions, refits, conversion."""
