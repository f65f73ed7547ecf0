"""Parts that several ops share: argument checks, head layout, tiles, triangular systems, similarities, dispatch."""
