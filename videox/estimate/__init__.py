"""Estimates of FLOPs, memory, disk and time from configurations and the plan; trains nothing."""
