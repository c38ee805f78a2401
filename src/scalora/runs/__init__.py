"""One training run, from recipe to scores; :mod:`.export` is what comes after it."""
