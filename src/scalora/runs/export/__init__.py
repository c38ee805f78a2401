"""From what a run leaves to what others load."""
