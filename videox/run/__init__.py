"""The run folder: checkpoints, lock, resume, status, and how a failure of one process ends all."""
