"""The engine: one thread that turns requests into steps of one mixed batch."""
