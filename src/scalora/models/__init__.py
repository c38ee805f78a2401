"""Models by their source, the heads they compute with, and a network made on the spot."""
