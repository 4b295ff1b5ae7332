"""Bytes on disk: safetensors read tensor by tensor, files written atomically."""
