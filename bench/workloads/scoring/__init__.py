"""What an output answers, and the programs that check code."""
