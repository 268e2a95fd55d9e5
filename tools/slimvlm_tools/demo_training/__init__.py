"""How the demo model was trained: ``python -m slimvlm_tools.demo_training.train``."""
