"""Engines behind HTTP: clients, streamed replies, and the servers themselves."""
