"""A whole step of a decoder in one call."""
