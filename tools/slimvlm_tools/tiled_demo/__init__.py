"""A second demo model, whose vision tower takes most of the work of a picture."""
