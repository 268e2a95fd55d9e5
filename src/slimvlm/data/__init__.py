"""Read conversations, encode them as model inputs, and assign a role to each token."""
