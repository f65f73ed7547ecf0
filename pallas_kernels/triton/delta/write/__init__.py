"""The write's kernels, forward and backward, and their steps."""
