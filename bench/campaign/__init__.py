"""What a campaign measures: options, the cells they ask for, and when requests arrive."""
