"""The cases of the mixers, and functions that several tests use on them."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from deltaformer_jax.layers.mixers.delta_former import DeltaFormer
from deltaformer_jax.layers.mixers.delta_net import DeltaNet
from deltaformer_jax.layers.mixers.delta_rules.delta_product import GatedDeltaProduct
from deltaformer_jax.layers.mixers.delta_rules.gated_delta_net_2 import GatedDeltaNet2
from deltaformer_jax.layers.mixers.delta_rules.rwkv7 import RWKV7
from deltaformer_jax.layers.mixers.gated_delta_net import GatedDeltaNet
from deltaformer_jax.layers.mixers.gated_linear_attention import GatedLinearAttention
from deltaformer_jax.layers.mixers.kimi_delta_attention import KimiDeltaAttention
from deltaformer_jax.layers.mixers.linear_attention import LinearAttention
from deltaformer_jax.layers.mixers.retention import Retention
from deltaformer_jax.layers.mixers.softmax_attention import SoftmaxAttention
from deltaformer_jax.ops import Round

D_MODEL, HEADS, KV_HEADS, HEAD_DIM = 12, 4, 2, 6

# Every option of every mixer at least once, with grouped queries.
SOFTMAX_CASES = {
    "plain": {},
    "window": dict(window=3),
    "alibi": dict(rope_base=None, alibi=True),
    "all": dict(window=3, qk_norm=True, kv_shift=True, rope_base=100.0),
    "forgetting": dict(forget_gate=True, rope_base=None, alibi=True),
    "fire": dict(rope_base=None, position_bias="fire", fire_length=4, forget_gate=True),
    "dape": dict(rope_base=None, position_bias="kerple", dape_dim=3, window=5, sinks=True),
    "sinks": dict(forget_gate=True, sinks=True, window=4, initial_tokens=2, kv_shift=True, kv_shift_parts="value"),
    "gated": dict(output_gate=True, conv_size=3, qk_norm=True, read_similarity="self_adjust"),
}
DELTA_CASES = {
    "key": {},
    "query, tied": dict(write_query="query"),
    "projected": dict(write_query="projected", alpha="sigmoid", qk_norm=True),
    "linear": dict(write_similarity="linear", read_similarity="linear", beta="one", window=5),
    "relu": dict(
        write_similarity="relu", read_similarity="relu", kv_shift=True, write_query="query", write_rope_base=None
    ),
    "exp": dict(write_similarity="exp", read_similarity="softmax", write_scale=0.1, beta="raw"),
    # Three decimals. If a score is halfway between two rounded values, an error of 1e-16 decides the result.
    "round": dict(write_similarity=Round(3), rope_base=None, write_query="projected"),
    "all": dict(
        write_query="projected",
        write_key_norm="on",
        read_scale=0.3,
        alpha="sigmoid",
        qk_norm=True,
        kv_shift=True,
        write_rope_base=50.0,
        window=4,
        initial_tokens=1,
    ),
    "long keys": dict(write_similarity="linear", write_key_norm="off", write_scale=0.05),
    "gated": dict(output_gate=True, conv_size=4, kv_shift=True, kv_shift_window=4, write_rope_base=None),
    "biases": dict(rope_base=None, position_bias="fire", fire_length=4, position_bias_in="both", window=5),
    "gated, projected": dict(
        write_query="projected",
        output_gate=True,
        conv_size=2,
        kv_shift=True,
        qk_norm=True,
        read_similarity="self_adjust_basic",
    ),
}
CASES = [(SoftmaxAttention, name, SOFTMAX_CASES[name]) for name in SOFTMAX_CASES]
CASES += [(DeltaFormer, name, DELTA_CASES[name]) for name in DELTA_CASES]
CASE_IDS = [f"{mixer.__name__}-{name}" for mixer, name, _ in CASES]

# Mixers with a state of fixed size. HEADS is their number of query and key heads.
MEMORY_CASES = [
    (LinearAttention, "plain", {}),
    (Retention, "wide values", dict(value_dim=5)),
    (Retention, "no rope, no gate", dict(rope_base=None, output_gate=False)),
    (GatedLinearAttention, "plain", {}),
    (GatedLinearAttention, "convolutions", dict(conv_size=3, value_dim=5)),
    (DeltaNet, "plain", {}),
    (DeltaNet, "all", dict(num_value_heads=8, value_dim=3, output_gate=True, negative_eigenvalues=True, conv_size=2)),
    (GatedDeltaNet, "plain", {}),
    (GatedDeltaNet, "no convolutions, grouped", dict(num_value_heads=8, conv_size=0, output_gate=False)),
    (KimiDeltaAttention, "plain", {}),
    (
        KimiDeltaAttention,
        "wide values, bounded decay",
        dict(value_dim=8, conv_size=1, negative_eigenvalues=True, decay_lower_bound=-5.0),
    ),
    (GatedDeltaNet2, "grouped", dict(num_value_heads=8, value_dim=3, conv_size=2)),
    (
        GatedDeltaProduct,  # of which DeltaProduct is the part without a decay
        "three steps, grouped",
        dict(householder_steps=3, num_value_heads=8, value_dim=3, conv_size=2, negative_eigenvalues=True),
    ),
    (RWKV7, "wide values", dict(value_dim=8, gate_rank=3)),
]
MEMORY_IDS = [f"{mixer.__name__}-{name}" for mixer, name, _ in MEMORY_CASES]


def make_mixer(mixer, options, *, dtype=jnp.float32, **sizes):
    """A mixer with random parameters in `dtype`."""
    sizes = dict(d_model=D_MODEL, num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM) | sizes
    sizes = {name: size for name, size in sizes.items() if name in inspect.signature(mixer.__init__).parameters}
    return randomise(lambda: mixer(**sizes, **options, dtype=dtype, rngs=nnx.Rngs(0)), dtype)


def randomise(build, dtype=jnp.float32):
    """The module that `build` builds, with random parameters: gains around 1, all others around 0.

    So no parameter has a special initial value such as 0 or 1. Compiling the module's own initialisation would also
    take longer than most tests.
    """
    random = np.random.default_rng(1)

    def draw(path, leaf):
        gain = "scale" in jax.tree_util.keystr(path[-2:])
        return jnp.asarray(gain + 0.25 * random.standard_normal(leaf.shape), dtype)

    return jax.tree.map_with_path(draw, jax.eval_shape(build))


# Jitted once for all tests, which all use the shape [2, 12, D_MODEL].
ROWS, LENGTH = 2, 12
outputs = jax.jit(lambda module, x: module(x)[0])


def normal(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def feed(call, cache, rows, plan, padding):
    """Feeds rows [B,T,...] block by block through `call(block, segment_ids, cache) -> (outputs, cache)`.

    Each entry of `plan` is (tokens of each row, block width, side of the padding). `padding` fills the rest of a block.
    Returns the outputs of the real tokens of each row, in order, and the last cache.
    """
    done, outputs = [0] * len(rows), [[] for _ in rows]
    for counts, width, side in plan:
        block = np.full((len(rows), width, *rows.shape[2:]), padding, rows.dtype)
        ids = np.zeros((len(rows), width), np.int32)
        for row, count in enumerate(counts):
            place = slice(width - count, width) if side == "left" else slice(0, count)
            block[row, place], ids[row, place] = rows[row, done[row] : done[row] + count], 1
            done[row] += count
        out, cache = call(jnp.asarray(block), jnp.asarray(ids), cache)
        for row in range(len(rows)):
            outputs[row].append(np.asarray(out)[row][ids[row] == 1])
    return [np.concatenate(parts) for parts in outputs], cache


# Chunked prefill, padded left, then right; single tokens; a row without new tokens. In all 12 and 9 tokens.
PLAN = [((4, 2), 4, "left"), ((4, 3), 4, "right"), ((1, 1), 1, "left"), ((1, 0), 1, "left"), ((2, 3), 4, "left")]
PLAN_LENGTHS = (12, 9)
