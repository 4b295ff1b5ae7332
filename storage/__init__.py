"""Bytes on disk: safetensors read tensor by tensor, files that are there whole or not at all."""
