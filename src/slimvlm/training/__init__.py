"""Train what is left towards the original model."""
