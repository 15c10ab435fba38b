"""Whether every kernel of a step computes on this card what its reference says: tried at start."""
