"""Checkpoints that do not fit in memory: scored and pruned with one layer at a time."""
