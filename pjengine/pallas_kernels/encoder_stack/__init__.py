"""All layers of a post-norm encoder in one launch, for batches of 16 tokens."""
