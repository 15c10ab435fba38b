"""Replies of a given shape: JSON of a schema, a pattern, a choice, a grammar. Nothing else imports llguidance."""
