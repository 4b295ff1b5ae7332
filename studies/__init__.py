"""Models measured: one by one, by category, and in studies."""
