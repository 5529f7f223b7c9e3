"""Measurements of aim-surgery: one command each, `python -m benchmarks.NAME`."""
