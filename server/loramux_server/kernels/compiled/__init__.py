"""The compiled library: what it declares, how it is found, and what calls it without knowing a model."""
