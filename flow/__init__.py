"""The process. It knows nothing of networks: a model is any callable (z, t, condition) → y."""
