"""Captions to text tokens and pooled vectors."""
