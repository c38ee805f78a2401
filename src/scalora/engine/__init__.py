"""ScaLoRA itself: what happens before an optimizer step. Needs torch and PEFT only."""
