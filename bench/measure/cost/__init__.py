"""The cost of one step, by width, context, batch size and phase."""
