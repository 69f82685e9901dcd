"""Index of the data set: metadata rows and what probing their media files found, as columns."""
