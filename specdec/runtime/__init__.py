"""Devices, timing, recorded graphs, files and progress: the base of all other packages."""
