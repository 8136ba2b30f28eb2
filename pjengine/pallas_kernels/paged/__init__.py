"""Attention of a ragged batch over a paged KV cache."""
