"""Attention inside each sequence of a packed batch, without a cache."""
