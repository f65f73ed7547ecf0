"""Calls of `delta_attention` as data: what a call is, a random one, its arrays, and the function."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np

from deltaformer_jax import delta_attention
from on_gpu.plans import use_plan
from pallas_kernels.triton.delta.table import TABLE, Tile


@dataclasses.dataclass(frozen=True)
class Shape:
    """A call of `delta_attention`.

    write, read: similarities. write_query: "key", "query" or "heads" (an array of its own). documents: how many a row
    has, 0 for no segment ids. padding: some tokens have id 0. A scale that is None is K ** -0.5.
    """

    batch: int = 1
    time: int = 8192
    heads: int = 4
    kv_heads: int = 4
    width: int = 128
    value_width: int = 128
    write: str = "softmax"
    read: str = "softmax"
    write_query: str = "key"
    write_scale: float | None = None
    read_scale: float | None = None
    alpha: bool = False
    beta: bool = True
    documents: int = 0
    padding: bool = False

    def __str__(self):
        pair = lambda a, b: str(a) if a == b else f"{a} and {b}"
        gates = "".join(f", {name}" for name in ("alpha", "beta") if getattr(self, name))
        documents = f", {self.documents} documents" if self.documents else ""
        w = {"key": "w = k", "query": "w = q", "heads": "untied"}[self.write_query]
        return (
            f"{pair(self.write, self.read)}, {w}, {self.batch} × {self.time} tokens, heads "
            f"{pair(self.heads, self.kv_heads)} of {pair(self.width, self.value_width)}{gates}{documents}"
        )


def draw(rng: np.random.Generator, longest: int) -> Shape:
    """A random call of at most `longest` tokens."""
    kv_heads = int(rng.integers(1, 3))
    write = str(rng.choice(["softmax", "softmax", "linear", "relu", "exp"]))
    read = str(rng.choice(["softmax", "softmax", write, "linear"]))
    width, value_width = (int(x) for x in rng.choice([16, 24, 32, 64, 80, 128], 2))
    # For similarities other than softmax the scores are kept small enough that u does not grow over 400 tokens.
    scale = lambda similarity: width**-0.5 * (1 if similarity == "softmax" else 0.05)
    return Shape(
        batch=int(rng.integers(1, 3)),
        time=int(rng.integers(1, longest)),
        heads=kv_heads * int(rng.integers(1, 4)),
        kv_heads=kv_heads,
        width=width,
        value_width=value_width,
        write=write,
        read=read,
        write_query=str(rng.choice(["key", "query", "heads"])),
        write_scale=scale(write),
        read_scale=width**-0.5 if read == "softmax" else scale(write),
        alpha=bool(rng.integers(2)),
        beta=bool(rng.integers(2)) or write != "softmax",
        documents=3 * int(rng.integers(2)),
        padding=bool(rng.integers(2)),
    )


def bound(shape: Shape, dtype: str) -> float:
    """The largest relative error that rounding explains over a few hundred tokens: the rounding unit times its growth.

    For bfloat16 arrays, similarities other than softmax split the operands of products, so that only inputs and results
    are rounded.
    """
    if dtype == "float32":
        return 2e-4
    return 0.15 if "softmax" in (shape.write, shape.read) else 0.03


def inputs(shape: Shape, rng: np.random.Generator, dtype: str = "bfloat16"):
    """(arrays by the names of the op's arguments, segment ids or None, cotangents by the outputs' names)."""
    write_heads = shape.kv_heads if shape.write_query == "key" else shape.heads
    sizes = lambda *more: (shape.batch, shape.time, *more)
    normal = lambda *more: rng.standard_normal(sizes(*more), np.float32).astype(jnp.dtype(dtype))
    arrays = {
        "query": normal(shape.heads, shape.width),
        "key": normal(shape.kv_heads, shape.width),
        "value": normal(shape.kv_heads, shape.value_width),
    }
    if shape.write_query == "heads":
        arrays["write_query"] = normal(shape.heads, shape.width)
    if shape.alpha:
        arrays["alpha"] = normal(write_heads)
    if shape.beta:
        gates = 1 / (1 + np.exp(-rng.standard_normal(sizes(write_heads), np.float32)))
        arrays["beta"] = gates.astype(jnp.dtype(dtype))
    return arrays, segments(shape, rng), {"out": normal(shape.heads, shape.value_width)}


def segments(shape, rng: np.random.Generator) -> np.ndarray | None:
    """Segment ids [B, T] of documents of about equal lengths, padding first; None if the call has none."""
    if not shape.documents:
        return None
    ids = rng.integers(0 if shape.padding else 1, shape.documents + 1, (shape.batch, shape.time))
    return np.sort(ids, axis=1).astype(np.int32)


def call(shape: Shape, implementation: str):
    """(arrays, segments) -> {"out": output} of the op."""
    settings = dict(
        write_similarity=shape.write,
        read_similarity=shape.read,
        write_scale=shape.write_scale,
        read_scale=shape.read_scale,
        implementation=implementation,
    )
    if shape.write_query != "heads":
        settings["write_query"] = shape.write_query
    return lambda arrays, segments: {"out": delta_attention(**arrays, **settings, segment_ids=segments)}


def use_tiles(tiles: dict[str, list[int] | str]) -> None:
    """Replace entries of the kernels' tables in this process: kernel name -> the fields of a Tile, and "plan" -> the
    plan of the gated ops.

    Tiles are for softmax between two-byte arrays and head dimensions up to 128. Other entries need smaller tiles.
    """
    if "plan" in tiles:
        use_plan(tiles["plan"])
    tiles = {kernel: sizes for kernel, sizes in tiles.items() if kernel != "plan"}
    for entry in TABLE.values():
        for kernel, sizes in tiles.items():
            *_, largest = entry[kernel, "narrow"]
            entry[kernel, "narrow"] = (Tile(*sizes), Tile(*sizes), largest)
