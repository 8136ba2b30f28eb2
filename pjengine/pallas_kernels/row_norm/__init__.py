"""RMS and layer norm of many rows."""
