"""Embeddings of more texts than fit in memory: from JSON lines to Parquet, resumable, and in Ray Data pipelines."""
