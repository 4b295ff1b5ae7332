"""The network. Knows nothing of noise, time grids, images or files of pictures."""
