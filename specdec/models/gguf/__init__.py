"""GGUF files: their header, their blocks of quantized weights, and loading them into transformers models."""
