"""Command-line tools for single questions, each run as `python -m bench.tools.NAME`."""
