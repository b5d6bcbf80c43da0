"""What the documented figures come from: one command each, `python -m benchmarks.NAME`."""
