"""Flow matching and image conditioning as functions of tensors."""
