"""What stands around the training step: averages, checkpoints, log, progress. Knows no network, process or data."""
