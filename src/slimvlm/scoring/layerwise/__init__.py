"""A model run one decoder layer at a time: layers from memory or files, states in either, too."""
