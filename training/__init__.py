"""Where network, process and data meet for training."""
