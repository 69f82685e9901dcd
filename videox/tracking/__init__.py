"""Records and displays of a run: metrics.jsonl, trackers, progress bar, preview pictures."""
