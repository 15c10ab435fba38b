"""How files that strangers sent are opened and read: no links, strict JSON."""
