"""All-to-all over heads: each device runs an op on all tokens of its share of the heads.

    [B, T/P, h, …]  →  [B, T, h/P, …]  →  op  →  [B, T, H/P, V]  →  [B, T/P, H, V]

The op is the one-device op with its kernels, and no device waits for another one's result. The number of devices P must
divide every array's number of heads. A device sends (P − 1)/P of each array's numbers, once, and of the output's.
Source: Jacobs et al., DeepSpeed Ulysses, arXiv 2309.14509.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
from jax import lax

from deltaformer_jax.sharding.context.axis import whole_rows


def over_heads(op: Callable[..., jax.Array], arrays: dict[str, jax.Array | None], axis_name: str) -> jax.Array:
    """op(**arrays) [B, T/P, H, V] of a sequence that is sharded over the mesh axis `axis_name`, inside shard_map.

    Args:
      op: `delta_attention`, `causal_attention` or one of the gated ops' outputs, with its options bound.
      arrays: [B, T/P, h, …] by the op's names, each with its own number of heads h, except "segment_ids" and "keep"
        [B, T/P], and "sinks" [h], which is the same on every device. An array may be None. Documents may cross devices.

    Raises ValueError if the axis does not divide the heads of each array.
    """
    devices = lax.axis_size(axis_name)
    for name, x in arrays.items():
        heads = _heads(name, x)
        if heads is not None and heads % devices:
            raise ValueError(
                f"{name} has {heads} heads, which the {devices} devices of the mesh axis {axis_name!r} do not divide: "
                "use a form that leaves heads whole (delta_attention_pipeline, causal_attention_ring), or fewer devices"
            )

    def own(name, x):
        if x is None:
            return None
        if name in ("segment_ids", "keep"):
            return whole_rows(x, axis_name)
        if name == "sinks":
            share = x.shape[0] // devices
            return lax.dynamic_slice_in_dim(x, lax.axis_index(axis_name) * share, share)
        return lax.all_to_all(x, axis_name, split_axis=2, concat_axis=1, tiled=True)

    out = op(**{name: own(name, x) for name, x in arrays.items()})
    return lax.all_to_all(out, axis_name, split_axis=1, concat_axis=2, tiled=True)


def heads_divide(arrays: dict[str, jax.Array | None], devices: int) -> bool:
    """Whether `over_heads` can run: `devices` divides the number of heads of every array."""
    return all(heads is None or heads % devices == 0 for heads in map(_heads, arrays, arrays.values()))


def _heads(name, x):
    if x is None or name in ("segment_ids", "keep"):
        return None
    return x.shape[0] if name == "sinks" else x.shape[2]
