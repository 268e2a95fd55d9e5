"""From a plan to a smaller checkpoint: cut, repair, write, read back."""
