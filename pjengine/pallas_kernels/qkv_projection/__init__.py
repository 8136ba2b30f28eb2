"""`qkv_product`: the fused projection of q, k and v, head norms, rotation and KV write in one kernel."""
