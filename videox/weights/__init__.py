"""Tensors in files, in any layout; builds no model."""
