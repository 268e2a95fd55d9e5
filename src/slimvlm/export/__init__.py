"""Other forms of a finished checkpoint: quantised, GGUF, the hub; what serves it."""
