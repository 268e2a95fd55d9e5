"""The demo: a small real vision-language model, its data and its benchmarks, without a hub."""
