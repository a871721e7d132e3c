"""Typed settings, filled from a YAML recipe and what overrides it."""
