"""Positions of each row for models that derive them from a mask or from the length of their cache."""
