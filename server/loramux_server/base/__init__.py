"""The base model: where it comes from, what it is called, how it is loaded, and whether it can be served correctly."""
