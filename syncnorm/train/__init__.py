"""The trainer: configuration, data, models, and the loop over them."""
