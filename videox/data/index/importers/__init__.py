"""Dataset configurations of other tools and our own, read into sources; imports no torch."""
