"""Tensors in, tensors out: the theorems of arXiv 2510.23818. Read it beside the paper."""
