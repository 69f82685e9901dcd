"""Measurements of benchmarks/gpu.py, by part."""
