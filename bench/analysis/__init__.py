"""Conclusions from records: ratios of engines, the best gamma, changes between runs, break-even under load."""
