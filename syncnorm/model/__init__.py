"""Acting on whole models."""
