"""Model in training under each backend: optimizer step, checkpoint save and load, export."""
