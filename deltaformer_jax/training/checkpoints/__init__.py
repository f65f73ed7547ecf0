"""Checkpoints: saving, checking, restoring, and going back to one after bad batches."""
