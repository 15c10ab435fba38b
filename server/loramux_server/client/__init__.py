"""Talks to a running server over HTTP."""
