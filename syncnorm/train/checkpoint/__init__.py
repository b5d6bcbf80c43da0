"""Checkpoints: what they hold, how they reach the disk, and how a run resumes from them."""
