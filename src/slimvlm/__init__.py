"""Structural pruning and recovery for multimodal LLMs."""
