"""A generation request while it runs: the versions it leases, its sequences in the engine, and their text."""
