"""What one step costs, by width, context, batch size and phase."""
