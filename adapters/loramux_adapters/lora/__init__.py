"""An adapter in memory and as maths: host and device memory, and the deltas of a mixed batch."""
