"""Baselines to compare MMDiT with: a U-Net and two DiTs with the same contract."""
