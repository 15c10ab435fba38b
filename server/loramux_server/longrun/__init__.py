"""What commands that take long have in common: they can be stopped well, and say how far they are."""
