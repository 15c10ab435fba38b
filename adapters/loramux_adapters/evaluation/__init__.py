"""What an adapter is worth, in figures and words."""
