"""Ask questions, score answers, compare models, time them."""
