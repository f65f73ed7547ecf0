"""The gated ops compiled for an H100 with no GPU at hand: launches, and the bytes that they read and write.

Nothing runs. A row is one launch, of bfloat16, batch 4, 32 heads, 8192 tokens, head dimension 128, for every plan of
pallas_kernels/triton/gated/table.py and both kinds of decay. A kernel's operands and outputs count once each: an array
that several programs read is in the card's cache at best. A kernel is named by its outputs; XLA's launches are one row.
"""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
from measure import report
from on_gpu import gated
from on_gpu.compare import with_gradients
from on_gpu.plans import planned
from on_gpu.times import GATED_SIZES

from deltaformer_jax.compiled.launches import launches
from deltaformer_jax.training.ahead_of_time.topologies import find_topology, without_cache
from pallas_kernels.triton.gated.table import PLANS


def shapes_of(shape: gated.Shape):
    """(arrays, segments, cotangents) of a call as shapes."""
    sizes = lambda *more, dtype=jnp.bfloat16: jax.ShapeDtypeStruct((shape.batch, shape.time, *more), dtype)
    keys, values = sizes(shape.heads, shape.width), sizes(shape.value_heads, shape.value_width)
    arrays = {"query": keys, "key": keys, "value": values}
    if shape.delta:
        arrays["beta"] = sizes(shape.value_heads)
    if shape.decay != "none":
        more = [shape.width] if shape.decay == "channel" else []
        arrays["log_decay"] = sizes(shape.value_heads, *more, dtype=jnp.float32)
    state = jax.ShapeDtypeStruct((shape.batch, shape.value_heads, shape.width, shape.value_width), jnp.float32)
    return arrays, None, {"out": values, "state": state}


def rows_of(function, arguments, device) -> list[dict]:
    """A row for each kernel's launch, one for XLA's, and the sum."""
    there = jax.sharding.SingleDeviceSharding(device)
    arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=there), arguments)
    compiled = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).compile()
    found, _ = launches(compiled.as_text())
    output = lambda x: re.sub(r"\{[^}]*\}", "", x.shape)
    rows = [{"launch": output(x), "GB": x.bytes / 1e9} for x in found if x.kernel]
    others = [x for x in found if not x.kernel]
    rows.append({"launch": f"XLA's {len(others)}", "GB": sum(x.turns * x.bytes for x in others) / 1e9})
    total = {"launch": "all", "GB": sum(row["GB"] for row in rows)}
    return [*rows, total | {"temporaries GB": compiled.memory_analysis().temp_size_in_bytes / 1e9}]


def show() -> None:
    """Print the tables."""
    device = find_topology("h100").devices[0]
    for decay in ("head", "channel"):
        shape = dataclasses.replace(gated.Shape(decay=decay), **GATED_SIZES)
        arrays, segments, cotangents = shapes_of(shape)
        for plan in PLANS:
            call = gated.call(shape, "triton")
            both = with_gradients(call)
            with planned(plan), without_cache():
                for direction, function, more in (("forward", call, ()), ("both directions", both, (cotangents,))):
                    rows = rows_of(function, (arrays, segments, *more), device)
                    report(f"a decay a {decay}, plan {plan!r}, {direction}", rows, None)
