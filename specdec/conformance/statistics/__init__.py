"""Statistics of an audit: facts about draws, the bets placed on them, and the draws that a verdict needs."""
