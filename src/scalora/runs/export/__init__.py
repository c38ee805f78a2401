"""What a run has left, in other forms: as a LoRA, merged, as differences; opened again, verified."""
