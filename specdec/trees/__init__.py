"""Draft trees: their shape, cache columns, verification, and the optimal tree."""
