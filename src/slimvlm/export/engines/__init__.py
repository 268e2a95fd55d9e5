"""Engines that serve checkpoints, asked by their own interpreters, beside transformers."""
