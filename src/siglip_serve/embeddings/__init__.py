"""Arithmetic on embeddings: unit length, zero-shot scores."""
