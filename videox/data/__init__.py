"""Serves both train.py scripts: metadata to batches; imports go only leftwards, from loader to metadata."""
