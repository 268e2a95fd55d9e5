"""Whole runs: compress, studies, reports, advice."""
