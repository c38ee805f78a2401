"""One run of a recipe, from data to a scored, saved adapter."""
