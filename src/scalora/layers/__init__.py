"""How one LoRA layer is laid out and computed; who trains it is unknown here."""
