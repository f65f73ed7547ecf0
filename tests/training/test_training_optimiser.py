"""The schedules' values, and what weight decay and clipping touch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltaformer_jax.config import ModelConfig, OptimizerConfig
from deltaformer_jax.model_parts import model_parts
from deltaformer_jax.training.optimiser import learning_rate_schedule, make_optimiser


def values(config, steps):
    schedule = learning_rate_schedule(config)
    return np.array([float(schedule(jnp.int32(n))) for n in steps])


def expected(config, n):
    """The docstring of learning_rate_schedule, in plain Python."""
    peak, warmup, length = config.learning_rate, config.warmup_steps, config.decay_steps
    floor = peak * config.final_learning_rate
    if n < warmup:
        return peak * (n + 1) / warmup
    if config.schedule == "constant":
        return peak
    if config.schedule == "cosine":
        part = min((n - warmup) / (length - warmup), 1)
        return floor + (peak - floor) * (1 + np.cos(np.pi * part)) / 2
    down = round(config.wsd_decay_fraction * length)
    return peak - (peak - floor) * min(max(n - (length - down), 0) / down, 1)


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
@pytest.mark.parametrize("warmup", [0, 1, 10])
def test_schedule(schedule, warmup):
    config = OptimizerConfig(
        learning_rate=0.5, warmup_steps=warmup, decay_steps=50, schedule=schedule, wsd_decay_fraction=0.3
    )
    steps = [0, 1, 5, 9, 10, 11, 34, 35, 36, 49, 50, 51, 500]
    np.testing.assert_allclose(values(config, steps), [expected(config, n) for n in steps], rtol=1e-5)


def test_wsd_that_decays_all_the_way():
    config = OptimizerConfig(
        learning_rate=1.0,
        warmup_steps=10,
        decay_steps=20,
        schedule="wsd",
        wsd_decay_fraction=1.0,
        final_learning_rate=0.0,
    )
    np.testing.assert_allclose(values(config, [9, 10, 15, 20]), [1.0, 1.0, 0.5, 0.0], atol=1e-6)


def test_what_is_decayed_is_matrices():
    parts = model_parts(ModelConfig(vocab_size=32, d_model=32, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=16))
    decayed = {}
    for path, decay in jax.tree_util.tree_leaves_with_path(parts.decay):
        decayed[jax.tree_util.keystr(path, simple=True, separator=".")] = decay
    assert {name for name, decay in decayed.items() if not decay} == {
        name for name in decayed if name.endswith(("scale", "bias"))
    }
    assert decayed["embedding.table"] and decayed["blocks.0.mixer.output"] and not decayed["final_norm.scale"]

    params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), parts.params)
    optimiser = make_optimiser(OptimizerConfig(learning_rate=0.1, warmup_steps=0, weight_decay=0.5), parts.decay)
    updates, _ = optimiser.update(jax.tree.map(jnp.zeros_like, params), optimiser.init(params), params)
    for update, decay in zip(jax.tree.leaves(updates), jax.tree.leaves(parts.decay), strict=True):
        np.testing.assert_allclose(update, -0.05 if decay else 0.0, rtol=1e-6)


@pytest.mark.parametrize(("clip_norm", "first_moment"), [(1.0, 0.1 * 0.6), (0.0, 0.1 * 3.0)])
def test_clipping_by_the_global_norm(clip_norm, first_moment):
    params = {"a": jnp.zeros(()), "b": jnp.zeros(())}
    optimiser = make_optimiser(OptimizerConfig(clip_norm=clip_norm, b1=0.9), {"a": True, "b": True})
    _, state = optimiser.update({"a": jnp.float32(3.0), "b": jnp.float32(4.0)}, optimiser.init(params), params)
    leaves = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}
    moments = [leaf for name, leaf in leaves.items() if name.endswith(".mu['a']")]
    np.testing.assert_allclose(moments, [first_moment], rtol=1e-6)
