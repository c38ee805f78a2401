"""Optimizer steps in coordinates in which inputs and output gradients are white, from sketches of their moments."""
