"""Engines behind one protocol, a module each."""
