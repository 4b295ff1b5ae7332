"""Pictures and captions to latents and text tokens, and back."""
