"""The prompts that are measured: a module for each data set."""
