"""Where a layer's training statistics come from: one file for each mode."""
