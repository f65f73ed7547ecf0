"""Calls of the gated ops as data: what a call is, a random one, its arrays, and the function."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np

from deltaformer_jax import gated_delta_rule, gated_linear_attention
from on_gpu.delta import segments


@dataclasses.dataclass(frozen=True)
class Shape:
    """A call of `gated_delta_rule` (delta) or `gated_linear_attention`.

    decay: "none", "head" or "channel". strength: the log decays are up to this times one. documents, padding: as in
    delta.Shape.
    """

    batch: int = 1
    time: int = 8192
    heads: int = 4
    value_heads: int = 4
    width: int = 128
    value_width: int = 128
    delta: bool = True
    decay: str = "head"
    strength: float = 1.0
    initial_state: bool = True
    documents: int = 0
    padding: bool = False

    def __str__(self):
        pair = lambda a, b: str(a) if a == b else f"{a} and {b}"
        documents = f", {self.documents} documents" if self.documents else ""
        return (
            f"{'delta rule' if self.delta else 'linear attention'}, decay: {self.decay} × {self.strength:g}, "
            f"{self.batch} × {self.time} tokens, heads {pair(self.heads, self.value_heads)} of "
            f"{pair(self.width, self.value_width)}{documents}"
        )


def draw(rng: np.random.Generator, longest: int) -> Shape:
    """A random call of at most `longest` tokens."""
    heads = int(rng.integers(1, 3))
    width, value_width = (int(x) for x in rng.choice([16, 24, 32, 64, 80, 128, 256], 2))
    return Shape(
        batch=int(rng.integers(1, 3)),
        time=int(rng.integers(2, longest)),
        heads=heads,
        value_heads=heads * int(rng.integers(1, 4)),
        width=width,
        value_width=value_width,
        delta=bool(rng.integers(3)),
        decay=str(rng.choice(["none", "head", "channel"])),
        strength=float(rng.choice([1, 1000])),
        documents=3 * int(rng.integers(2)),
        padding=True,
    )


def bound(shape: Shape, dtype: str) -> float:
    """The largest relative error that rounding explains over a few hundred tokens."""
    return {"float32": 2e-4, "bfloat16": 0.1}[dtype]


def inputs(shape: Shape, rng: np.random.Generator, dtype: str = "bfloat16"):
    """(arrays by the names of the op's arguments, segment ids or None, cotangents by the outputs' names)."""
    normal = lambda *sizes: rng.standard_normal((shape.batch, shape.time, *sizes), np.float32)
    cast = lambda x: x.astype(jnp.dtype(dtype))
    state = lambda: rng.standard_normal((shape.batch, shape.value_heads, shape.width, shape.value_width), np.float32)
    key = normal(shape.heads, shape.width)
    arrays = {
        "query": cast(normal(shape.heads, shape.width)),
        "key": cast(key / np.linalg.norm(key, axis=-1, keepdims=True)),
        "value": cast(normal(shape.value_heads, shape.value_width)),
    }
    if shape.initial_state:
        arrays["initial_state"] = state()
    if shape.delta:
        arrays["beta"] = cast(1 / (1 + np.exp(-normal(shape.value_heads))))
    if shape.decay != "none":
        gates = normal(shape.value_heads, *([shape.width] if shape.decay == "channel" else []))
        arrays["log_decay"] = -shape.strength * np.exp(2 * gates - 2)
    cotangents = {"out": cast(normal(shape.value_heads, shape.value_width)), "state": state()}
    return arrays, segments(shape, rng), cotangents


def call(shape: Shape, implementation: str):
    """(arrays, segments) -> {"out": output, "state": final state} of the op."""
    op = gated_delta_rule if shape.delta else gated_linear_attention

    def run(arrays, segments):
        out, state = op(**arrays, segment_ids=segments, implementation=implementation)
        return {"out": out, "state": state}

    return run
