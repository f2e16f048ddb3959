"""Files of models: formats, fingerprints, weights derived from others, and generation configs."""
