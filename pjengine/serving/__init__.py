"""The OpenAI-compatible HTTP server, the bridge to the engine's process, and the command line."""
