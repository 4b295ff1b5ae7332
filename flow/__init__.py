"""The process. Knows nothing of networks: a model is any callable (z, t, condition) → y."""
