"""A generation request from its body to the last chunk of its reply."""
