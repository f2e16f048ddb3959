"""Row invariance: whether a prefix's logits depend on what is computed beside it."""
