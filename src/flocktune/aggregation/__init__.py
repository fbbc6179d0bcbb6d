"""Model aggregation: how updates become the next adapter. Pure functions on named tensors."""
