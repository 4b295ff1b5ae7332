"""Training: network, objective and data joined."""
