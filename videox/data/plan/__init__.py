"""The plan of an epoch: buckets, micro-batches, balancing. Pure functions of NumPy arrays; imports no torch."""
