"""Which tokens may come next: the protocol, bans, and grammars by llguidance."""
