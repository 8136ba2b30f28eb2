"""`gated_product`: an MLP's gate and up projections and their SwiGLU in one kernel."""
