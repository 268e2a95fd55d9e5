"""Conversations: reading them, rendering them as model inputs, and whose turn each token is."""
