"""Rotation of queries and keys fused with the in-place write into the paged KV cache."""
