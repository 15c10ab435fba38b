"""A base's layers laid out on a graphics processor while they are loaded."""
