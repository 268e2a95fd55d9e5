"""A model run one decoder layer at a time, with layers and hidden states in memory or in files."""
