"""One list of cases for every implementation of the gated ops, and functions that draw their inputs."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np

from deltaformer_jax import gated_delta_rule, gated_linear_attention


@dataclasses.dataclass(frozen=True)
class Case:
    """Static settings of one call."""

    delta: bool = True
    decay: str = "head"  # "none", "head", "channel"
    beta: str = "sigmoid"  # "none", "zero", "sigmoid", "to_two"
    heads: int = 2
    value_heads: int = 2
    key_dim: int = 4
    value_dim: int = 4
    time: int = 21
    chunk: int = 8
    state: bool = True
    scale: float | None = None


# Both ops with every kind of decay, grouped values with every kind, V != K. Chunk sizes: not a power of two, longer
# than T, one token, not a divisor of T, and small enough for several groups of chunks.
CASES = [
    Case(decay="none"),
    Case(value_heads=4, key_dim=5, value_dim=3),
    Case(decay="channel", chunk=7, scale=0.3),
    Case(beta="none", chunk=64, time=13, state=False),
    Case(decay="channel", value_heads=4, time=19, chunk=1, key_dim=3),
    Case(beta="to_two", time=50, chunk=3, heads=1, value_heads=3),
    Case(decay="none", beta="to_two", value_heads=4, chunk=16, time=33, value_dim=6, state=False),
    Case(decay="channel", beta="zero", heads=1, value_heads=1),
    Case(delta=False, decay="none", value_heads=6, state=False),
    Case(delta=False, key_dim=5, value_dim=3, chunk=5),
    Case(delta=False, value_heads=4, time=40, chunk=2, scale=1.0),
    Case(delta=False, decay="channel", value_heads=4, value_dim=7, chunk=16, time=37),
]


def case_id(case):
    defaults, given = dataclasses.asdict(type(case)()), dataclasses.asdict(case)
    different = (f"{name}={given[name]}" for name in given if given[name] != defaults[name])
    return "-".join(different) or "plain"


def draw_inputs(case, seed, dtype, batch=2, strength=1.0):
    """The arguments of a case. Keys have unit length; decays range from almost none to strong, times `strength`."""
    rng = np.random.default_rng(seed)
    shape = lambda heads, *more: (batch, case.time, heads, *more)
    normal = lambda *sizes: rng.standard_normal(shape(*sizes))
    key = normal(case.heads, case.key_dim)
    inputs = dict(
        query=normal(case.heads, case.key_dim),
        key=key / np.linalg.norm(key, axis=-1, keepdims=True),
        value=normal(case.value_heads, case.value_dim),
    )
    if case.delta and case.beta != "none":
        size = {"zero": 0.0, "sigmoid": 1.0, "to_two": 2.0}[case.beta]
        inputs["beta"] = size / (1 + np.exp(-2 * normal(case.value_heads)))
    if case.decay != "none":
        sizes = (case.value_heads, case.key_dim) if case.decay == "channel" else (case.value_heads,)
        inputs["log_decay"] = -strength * np.exp(2 * normal(*sizes) - 2)
    inputs = {name: jnp.asarray(x, dtype) for name, x in inputs.items()}
    if case.state:
        state = rng.standard_normal((batch, case.value_heads, case.key_dim, case.value_dim))
        inputs["initial_state"] = jnp.asarray(state, jnp.float64 if dtype == jnp.float64 else jnp.float32)
    return inputs


def draw_cotangents(case, dtype, batch=2, seed=1):
    """Random cotangents for the output and the final state."""
    rng = np.random.default_rng(seed)
    out = rng.standard_normal((batch, case.time, case.value_heads, case.value_dim))
    state = rng.standard_normal((batch, case.value_heads, case.key_dim, case.value_dim))
    return jnp.asarray(out, dtype), jnp.asarray(state, jnp.float64 if dtype == jnp.float64 else jnp.float32)


def call(case, inputs, implementation, segment_ids=None):
    """Calls the op of the case."""
    op = gated_delta_rule if case.delta else gated_linear_attention
    return op(**inputs, scale=case.scale, segment_ids=segment_ids, chunk_size=case.chunk, implementation=implementation)


def poison(inputs, segment_ids):
    """The inputs with NaN at padding; the initial state stays as it is."""
    hidden = np.asarray(segment_ids == 0)
    mark = lambda x: jnp.where(hidden.reshape(*hidden.shape, *[1] * (x.ndim - 2)), np.nan, x)
    return {name: x if name == "initial_state" else mark(x) for name, x in inputs.items()}
