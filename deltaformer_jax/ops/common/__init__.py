"""What all ops are made of: checks, heads, tiles, triangular systems, similarities, the choice of an implementation."""
