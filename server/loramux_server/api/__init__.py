"""The HTTP interface: OpenAI's routes, and ours for adapters."""
