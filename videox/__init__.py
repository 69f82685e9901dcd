"""Serves both train.py scripts: the shared package of the videox trainer."""

__version__ = "0.1.0"
