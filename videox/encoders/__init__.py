"""Frozen encoders: pixels and captions to the tensors that a training step uses."""
