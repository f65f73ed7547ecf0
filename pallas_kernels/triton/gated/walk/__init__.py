"""The gated ops without decay, or with one decay per head, in two launches forward and four backward."""
