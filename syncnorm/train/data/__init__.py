"""Data sets, their files, the order of samples, and augmentation."""
