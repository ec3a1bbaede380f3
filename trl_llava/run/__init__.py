"""A run on disk and in its processes: output folder, checkpoints, signals, launching."""
