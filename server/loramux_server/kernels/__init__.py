"""Everything that is compiled or written for a device, and the choice among it."""
