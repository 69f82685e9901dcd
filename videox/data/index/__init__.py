"""Index of a data set: metadata rows and the probed properties of their media files, in columns."""
