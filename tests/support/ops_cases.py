"""One list of cases for every implementation of delta_attention, and functions that draw their inputs."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from deltaformer_jax import Round, delta_attention


@dataclasses.dataclass(frozen=True)
class Case:
    """Static settings of one call. `write_query`: "key", "query", or an array with "kv_heads" or "heads" heads."""

    write: object = "softmax"
    read: object = "softmax"
    write_query: str = "key"
    heads: int = 2
    kv_heads: int = 2
    key_dim: int = 4
    value_dim: int = 4
    time: int = 21
    chunk: int = 8
    alpha: bool = False
    beta: str = "sigmoid"  # "none", "zero", "one", "sigmoid"
    write_scale: float | None = None
    read_scale: float | None = None

    @property
    def write_heads(self):
        return self.kv_heads if self.write_query in ("key", "kv_heads") else self.heads

    @property
    def tied(self):
        return self.write_query == "query" and self.write == self.read == "softmax"


# Each similarity writes and reads at least once. Every kind of write query with grouped heads. V != K. Chunk sizes:
# longer than T, not a divisor of T, one row. A width that is not a power of two.
CASES = [
    Case(),
    Case(heads=4, kv_heads=2, key_dim=5, value_dim=3, alpha=True),
    Case(write_query="query", alpha=True),
    Case(write_query="query", heads=4, kv_heads=1, value_dim=6, time=20, chunk=20),
    Case(write_query="query", beta="none", write_scale=0.3, read_scale=0.3, chunk=7),
    Case(write_query="query", write_scale=0.3, read_scale=0.7),
    Case(write_query="kv_heads", heads=6, kv_heads=2, time=16, chunk=8, alpha=True),
    Case(write_query="heads", heads=4, kv_heads=2, chunk=64, time=13),
    Case("linear", "linear", write_scale=0.25, alpha=True),
    Case("linear", "softmax", write_query="heads", heads=4, kv_heads=2, write_scale=0.25, time=9, chunk=1),
    Case("relu", "relu", write_scale=0.25, value_dim=7, beta="one"),
    Case("exp", "exp", write_scale=0.25, heads=4, beta="sigmoid"),
    Case("round", Round(decimals=1), write_scale=0.25, alpha=True),
    Case("softmax", "linear", beta="zero", write_query="query"),
    Case("softmax", "exp", beta="one", heads=3, kv_heads=1),
]


def case_id(case):
    defaults = dataclasses.asdict(Case())
    given = dataclasses.asdict(case)
    return "-".join(str(given[name]) for name in given if given[name] != defaults[name]) or "plain"


def draw_inputs(case, seed, dtype, batch=2):
    """The array arguments of a case. alpha, beta and write_query are present only if the case has them as arrays."""
    rng = np.random.default_rng(seed)
    normal = lambda heads, width: jnp.asarray(rng.standard_normal((batch, case.time, heads, width)), dtype)
    inputs = dict(
        query=normal(case.heads, case.key_dim),
        key=normal(case.kv_heads, case.key_dim),
        value=normal(case.kv_heads, case.value_dim),
    )
    if case.alpha:
        inputs["alpha"] = normal(case.write_heads, 1)[..., 0]
    gate = {
        "zero": np.zeros,
        "one": np.ones,
        "sigmoid": lambda shape: 1 / (1 + np.exp(-2 * rng.standard_normal(shape))),
    }
    if case.beta != "none":
        inputs["beta"] = jnp.asarray(gate[case.beta]((batch, case.time, case.write_heads)), dtype)
    if case.write_query in ("kv_heads", "heads"):
        inputs["write_query"] = normal(case.write_heads, case.key_dim)
    return inputs


def call(case, inputs, implementation, segment_ids=None, **more):
    """Calls delta_attention with the settings of the case."""
    named = {} if "write_query" in inputs else {"write_query": case.write_query}
    return delta_attention(
        **inputs,
        **named,
        write_similarity=case.write,
        read_similarity=case.read,
        write_scale=case.write_scale,
        read_scale=case.read_scale,
        segment_ids=segment_ids,
        chunk_size=case.chunk,
        implementation=implementation,
        **more,
    )


@st.composite
def segment_rows(draw, time, batch=2):
    """Segment ids [batch, time]: runs of real tokens with distinct ids; padding before, between and after them."""
    rows = []
    for _ in range(batch):
        row, number = [], 0
        while len(row) < time:
            length = draw(st.integers(1, time))
            if draw(st.booleans()):
                number += 1
                row += [number * 3] * length
            else:
                row += [0] * length
        rows.append(row[:time])
    return np.asarray(rows, np.int32)


@st.composite
def padded_rows(draw, time, batch=2):
    """Segment ids [batch, time]: one document per row, with padding on its left and on its right."""
    rows = []
    for _ in range(batch):
        left = draw(st.integers(0, time - 1))
        right = draw(st.integers(0, time - 1 - left))
        rows.append([0] * left + [1] * (time - left - right) + [0] * right)
    return np.asarray(rows, np.int32)


def poison(inputs, segment_ids):
    """The inputs with NaN at padding."""
    hidden = jnp.asarray(segment_ids == 0)
    mark = lambda x: jnp.where(hidden.reshape(*hidden.shape, *[1] * (x.ndim - 2)), jnp.nan, x)
    return jax.tree.map(mark, inputs)


def inverse_norm(case, inputs, segment_ids=None, visible=None):
    """max over heads of ‖(I + diag(β) A)⁻¹‖∞, in NumPy: the factor by which the write amplifies a rounding error.
    `visible` bool [B, T, T] says more than `segment_ids` which tokens a token sees."""
    similarity = {
        "linear": lambda s: s,
        "relu": lambda s: np.maximum(s, 0),
        "exp": np.exp,
        "softmax": np.exp,
        "round": lambda s: np.round(s, 2),
    }[case.write]
    k = np.asarray(inputs["key"], np.float64)
    w = np.asarray(
        inputs.get("write_query", inputs["query"] if case.write_query == "query" else inputs["key"]), np.float64
    )
    _, time, heads, width = w.shape
    k = np.repeat(k, heads // k.shape[2], axis=2)
    scale = width**-0.5 if case.write_scale is None else case.write_scale
    a = similarity(np.einsum("bihk,bjhk->bhij", w, k) * scale) * np.tri(time, k=-1)
    if segment_ids is not None:
        same = (segment_ids[:, :, None] == segment_ids[:, None, :]) & (segment_ids != 0)[:, :, None]
        a = np.where(same[:, None], a, 0)
    if visible is not None:
        a = np.where(visible[:, None], a, 0)
    if case.write == "softmax":
        total = a.sum(-1, keepdims=True)
        a = a / np.where(total > 0, total, 1)
    if "beta" in inputs:
        beta = np.asarray(inputs["beta"], np.float64)
        beta = beta if segment_ids is None else np.where(segment_ids[:, :, None] != 0, beta, 0)
        a = a * np.moveaxis(beta, 1, 2)[..., None]
    return np.abs(np.linalg.inv(np.eye(time) + a)).sum(-1).max()
