"""The latent store: written once, read at random, checked to the bit."""
