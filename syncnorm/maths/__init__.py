"""Mathematics of normalisation on tensors. Knows no network."""
