"""Model folders and files: checks them and loads components. Names no model family's classes."""
