"""Ours beside other servers, each from an environment of its own, with the same model, adapters and requests."""
