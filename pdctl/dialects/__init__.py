"""One registry, several wires: each dialect translates; none decides."""
