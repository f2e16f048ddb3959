"""Devices, timing, recorded graphs, files and progress: what the rest is built on."""
