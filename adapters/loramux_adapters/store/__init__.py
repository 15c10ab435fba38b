"""Adapters on disk: names, immutable versions, and who uses which."""
