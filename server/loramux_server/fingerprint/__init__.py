"""Prompts and the answers an adapter gave when it was made; replaying them proves that it still does."""
