"""New adapters along the gradient's top singular directions (Theorem 1), from sketches."""
