"""The decoders of encoder-decoder models, over ragged caches."""
