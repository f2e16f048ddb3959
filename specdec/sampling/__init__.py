"""From logits to distributions and draws."""
