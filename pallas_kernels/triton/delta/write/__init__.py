"""The write's kernels, forward and backward, and the functions they call."""
