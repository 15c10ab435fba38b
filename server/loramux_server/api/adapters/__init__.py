"""Adapters over HTTP: upload, list, download, roll back, pin, delete; and vLLM's two calls."""
