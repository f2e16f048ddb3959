"""Charts as plain data, and their renderers."""
