"""The mixers: one memory a file."""
