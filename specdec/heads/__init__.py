"""Drafting heads: small trained networks that draft from the target's own hidden states."""
