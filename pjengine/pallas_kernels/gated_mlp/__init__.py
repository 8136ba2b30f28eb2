"""The gate and up projections of an MLP and their activation, as one kernel."""
