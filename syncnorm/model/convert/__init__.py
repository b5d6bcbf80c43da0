"""Conversion of a model's batch norms to ours, and back."""
