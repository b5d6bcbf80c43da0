"""The configuration of a run: keys and rules, files, error messages, and what is shown of them."""
