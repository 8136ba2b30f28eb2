"""Rotation of the queries and keys of a fused projection, in place."""
