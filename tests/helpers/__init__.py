"""What tests share: models, data, short runs."""
