"""Examples from files to batches of tokens."""
