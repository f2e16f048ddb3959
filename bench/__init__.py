"""The benchmark harness: `pytest bench/ --benchmark-json=out.json` measures how much faster speculative decoding is."""
