"""Hooks of other libraries for our layers: one file for each, imported only by its users."""
