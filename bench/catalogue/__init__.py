"""Which model pairs and drafting methods are measured."""
