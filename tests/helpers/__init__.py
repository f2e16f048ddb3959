"""Toy models, statistical gates and devices that the tests share."""
