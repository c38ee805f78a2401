"""What every room may use: errors, files, names on disk, packaged models and data. Knows nothing of LoRA."""
