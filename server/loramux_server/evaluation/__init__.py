"""Contenders, here or behind a URL, answer held-out examples."""
