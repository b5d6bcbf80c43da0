"""The commands that print the documented figures: `python -m benchmarks.NAME`."""
