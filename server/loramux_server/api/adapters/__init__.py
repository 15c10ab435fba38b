"""Adapters over HTTP: upload, download, life cycle."""
