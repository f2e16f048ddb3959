"""Draft trees: their shape, columns in the cache, verification, and which tree is best."""
