"""Adapters into and out of service: tried out, preloaded, watched, pinned, backed up."""
