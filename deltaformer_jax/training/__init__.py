"""Training: set-up, state, step, loop, optimiser, guard against bad batches, evaluation, checkpoints, metrics."""
