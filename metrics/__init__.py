"""Measures of quality, on tensors of pictures."""
