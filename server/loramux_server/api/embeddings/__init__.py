"""Texts as vectors: what the base with an adapter reads of them, as OpenAI's /v1/embeddings has it."""
