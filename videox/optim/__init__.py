"""Optimizers by name, parameter groups, learning-rate schedules, optimizer state, EMA."""
