"""The engines of the benchmark, with a common protocol; one module for each."""
