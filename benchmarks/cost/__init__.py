"""What something costs: seconds, bytes, padding."""
