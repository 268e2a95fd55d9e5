"""Export a finished checkpoint: quantised or as GGUF; check which engines can serve it."""
