"""What several methods share; no method is found here."""
