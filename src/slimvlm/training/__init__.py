"""Recover a pruned model by training it against the original."""
