"""Processes: launch modes, rendezvous, collectives, signals."""
