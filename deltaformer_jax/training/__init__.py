"""Training: state, step, loop, optimiser, checkpoints, metrics, sharding, evaluation, sampling."""
