"""What the HTTP API takes and gives, as pydantic models: one file per family of endpoints."""
