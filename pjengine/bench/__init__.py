"""Benchmarks: `pjengine bench …`. Each measures what the device can do first, and says what share of it was reached."""
