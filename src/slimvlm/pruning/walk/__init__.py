"""The walk: one pass through the decoder layers that chooses, cuts, refits and distils each."""
