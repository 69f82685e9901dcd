"""What a run records and shows: metrics, trackers, progress bar, previews."""
