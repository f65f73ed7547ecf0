"""The gated ops by the Pallas kernels, forward and backward, compiled to machine code for TPUs that are not here."""

import jax
import jax.numpy as jnp
import pytest
from support.tpu_compile import EVERY_TPU, compiled

from deltaformer_jax import gated_delta_rule, gated_linear_attention

pytestmark = pytest.mark.long

TIME, HEADS, WIDTH = 8192, 8, 128


def arrays(dtype, time=TIME, heads=HEADS, value_heads=HEADS, width=WIDTH, value_width=None, decay="head", beta=True):
    x = lambda heads, *width, dtype=dtype: jax.ShapeDtypeStruct((1, time, heads, *width), dtype)
    given = dict(query=x(heads, width), key=x(heads, width), value=x(value_heads, value_width or width))
    if beta:
        given["beta"] = x(value_heads, dtype=jnp.float32)
    if decay != "none":
        given["log_decay"] = x(value_heads, *[width] * (decay == "channel"), dtype=jnp.float32)
    return given


def gradients(op, segmented=False, implementation=None):
    """The op's output, final state and all gradients, as a function of its arrays."""

    def run(inputs):
        rest = dict(implementation=implementation)
        if segmented:
            rest["segment_ids"] = jnp.ones(inputs["key"].shape[:2], jnp.int32).at[:, 100:].set(2)
        out, pull = jax.vjp(lambda inputs: op(**inputs, **rest), inputs)
        return out, pull(jax.tree.map(lambda x: x * 0.5, out))

    return run


def check(program, inputs):
    """Two kernels, and beside inputs and outputs less than a few arrays of the op's own size (gradients before they
    are rounded, transposes, the states that enter groups of chunks): no state for each token."""
    assert program.kernels >= 2
    batch, time, heads, value_width = inputs["value"].shape
    width = inputs["key"].shape[3]
    # Rows and columns are filled up to whole tiles.
    fill = lambda n, tile: -(-n // tile) * tile
    own = batch * fill(time, 512) * fill(heads, 8) * max(fill(width, 128), fill(value_width, 128)) * 4
    # In float32 libtpu 0.0.52 takes 5.3 of them on v5e, 6.3 on v6e and 8.3 on 7x.
    assert program.memory.temp_size_in_bytes < 9 * own
    if time >= 8192:
        assert 9 * own < batch * time * heads * width * value_width


@pytest.mark.parametrize("tpu", EVERY_TPU)
@pytest.mark.parametrize(
    "dtype, decay",
    [(jnp.bfloat16, "head"), (jnp.float32, "head"), (jnp.bfloat16, "channel")],
    ids=["bfloat16", "float32", "bfloat16, channels"],
)
def test_forward_and_backward(tpu, dtype, decay):
    """No implementation is named: the platform the program is compiled for chooses."""
    inputs = arrays(dtype, decay=decay)
    check(compiled(gradients(gated_delta_rule), tpu, (inputs,)), inputs)


OTHERS = {
    "float32, channels": (gated_delta_rule, arrays(jnp.float32, decay="channel"), False),
    "linear": (gated_linear_attention, arrays(jnp.bfloat16, 2048, beta=False), False),
    "linear, channels, packed": (gated_linear_attention, arrays(jnp.float32, 1000, decay="channel", beta=False), True),
    "linear, no decay": (gated_linear_attention, arrays(jnp.bfloat16, 1000, 2, 6, decay="none", beta=False), False),
    "grouped and packed": (gated_delta_rule, arrays(jnp.bfloat16, 2000, 4, 8, 64, 128), True),
    "width 256": (gated_delta_rule, arrays(jnp.float32, 2048, 2, 2, 256), True),
    "width 256, channels": (gated_delta_rule, arrays(jnp.float32, 1024, 2, 2, 256, decay="channel"), True),
    "width 32": (gated_delta_rule, arrays(jnp.bfloat16, 1024, 2, 4, 32, 64, decay="channel"), False),
    "widths of no tile": (gated_delta_rule, arrays(jnp.float32, 300, 2, 2, 50, 33, decay="none", beta=False), True),
    "a short row": (gated_delta_rule, arrays(jnp.bfloat16, 40, 2, 2, 96, 48, decay="channel"), False),
}


@pytest.mark.parametrize("op, inputs, segmented", OTHERS.values(), ids=OTHERS)
def test_others(op, inputs, segmented):
    check(compiled(gradients(op, segmented, "pallas_tpu"), "v5e", (inputs,)), inputs)
