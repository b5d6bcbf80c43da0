"""Training on workers that run out of data at different times."""
