from __future__ import annotations
import dataclasses
import jax, jax.numpy as jnp, numpy as np
from pallas_kernels.nvidia.launch import Launch, Output, run
from pallas_kernels.nvidia.table import Tile
from pallas_kernels.nvidia.weights import LOG2_E
from pallas_kernels.nvidia import write_forward as wf

@dataclasses.dataclass(frozen=True)
class Kind:
    name: str
    decimals: int = 2

def block_width(width):
    return max(16, 1 << (width - 1).bit_length())

def write_forward_launch(w, k, v, alpha, beta, segments, first, *, kind, scale, tile, group):
    batch, time, heads, width = w.shape
    value_width = v.shape[3]
    narrow = kind.name == "softmax" and np.dtype(v.dtype).itemsize == 2
    softmax = kind.name == "softmax"
    blocks = -(-time // tile.rows)
    some = k
    return Launch(
        wf.write_forward,
        (w, k, v, *(some if x is None else x for x in (alpha, beta, segments, first))),
        (Output((batch, time, heads, value_width), jnp.float32),
         Output((batch, time, heads, value_width) if narrow else (1,), v.dtype if narrow else jnp.float32),
         Output((batch, heads, time), jnp.float32),
         Output((1 + batch * heads,), jnp.int32, zeroed=True)),
        (time, np.float32(scale * (LOG2_E if softmax else 1))),
        batch * heads * blocks,
        dict(B=batch, HEADS=heads, KV_HEADS=k.shape[2], K=width, V=value_width, HAS_ALPHA=alpha is not None,
             HAS_BETA=beta is not None, HAS_SEGMENTS=segments is not None, NARROW=narrow, SIMILARITY=kind.name,
             POWER=float(10.0**kind.decimals), SCORE_PRECISION="tf32x3", PRECISION="tf32" if narrow else "tf32x3",
             ROWS=tile.rows, COLUMNS=tile.columns, HALVES=tile.halves, BLOCK_K=block_width(width),
             BLOCK_V=block_width(value_width), GROUP=group),
        tile.warps, tile.stages)
