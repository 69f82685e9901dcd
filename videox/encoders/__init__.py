"""Frozen encoders: pixels and prompts to the tensors that a training step takes."""
