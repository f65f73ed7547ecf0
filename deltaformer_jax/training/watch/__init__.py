"""Watching a run: metrics file, progress display, TensorBoard, statistics of the layers, profiles."""
