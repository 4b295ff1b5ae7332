"""The network. It knows nothing of noise, time grids, images or files of pictures."""
