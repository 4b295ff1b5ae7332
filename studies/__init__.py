"""Measures models: one by one, by category, and in studies."""
