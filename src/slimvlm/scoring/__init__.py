"""Run calibration batches through a model and score its units."""
