"""delta_attention by the Pallas kernels, forward and backward, compiled to machine code for TPUs that are not here."""

import jax
import jax.numpy as jnp
import pytest
from support.tpu_compile import EVERY_TPU, compiled

from deltaformer_jax import delta_attention, delta_values

pytestmark = pytest.mark.long

TIME, HEADS, WIDTH = 8192, 8, 128


def arrays(dtype, time=TIME, heads=HEADS, kv_heads=HEADS, width=WIDTH, value_width=None, write_heads=None):
    x = lambda heads, width: jax.ShapeDtypeStruct((1, time, heads, width), dtype)
    return dict(
        query=x(heads, width),
        key=x(kv_heads, width),
        value=x(kv_heads, value_width or width),
        beta=jax.ShapeDtypeStruct((1, time, write_heads or kv_heads), jnp.float32),
        segment_ids=jax.ShapeDtypeStruct((1, time), jnp.int32),
    )


def value_and_gradients(**settings):
    def run(inputs):
        floats = {name: x for name, x in inputs.items() if name != "segment_ids"}
        rest = {name: x for name, x in inputs.items() if name == "segment_ids"}

        def loss(floats):
            return delta_attention(**floats, **rest, **settings).astype(jnp.float32).sum()

        return jax.value_and_grad(loss)(floats)

    return run


def check(program, inputs, kernels):
    """Two kernels, and beside inputs and outputs no array as large as T×T numbers of one head, or T×C of all."""
    assert program.kernels >= kernels
    batch, time, heads, width = inputs["query"].shape
    # Arrays of the op's own size (u, residuals, gradients before they are rounded, transposes), float32.
    own = batch * time * heads * max(128, width, inputs["value"].shape[3]) * 4
    assert program.memory.temp_size_in_bytes < 10 * own
    if time >= 8192:
        assert 10 * own < time * time * 4 * heads


@pytest.mark.parametrize("tpu", EVERY_TPU)
@pytest.mark.parametrize("write_query", ["key", "query"])
def test_forward_and_backward(tpu, write_query):
    """No implementation is named: the platform the program is compiled for chooses."""
    inputs = arrays(jnp.bfloat16)
    del inputs["segment_ids"]
    check(compiled(value_and_gradients(write_query=write_query), tpu, (inputs,)), inputs, 2)


OTHERS = {
    "float32": (arrays(jnp.float32, 2048), {}),
    "grouped and packed": (arrays(jnp.bfloat16, 2000, kv_heads=2, value_width=64), {}),
    "linear, width 256": (arrays(jnp.bfloat16, 2048, 2, 2, 256), dict(write_similarity="linear", write_scale=0.01)),
    "round and relu, width 32": (
        arrays(jnp.bfloat16, 1000, 2, 2, 32),
        dict(write_similarity="round", read_similarity="relu"),
    ),
    "exp": (arrays(jnp.float32, 600, 2, 1, 96), dict(write_similarity="exp", read_similarity="exp")),
    "tied and packed": (arrays(jnp.bfloat16, 1000, 4, 2, 64, write_heads=4), dict(write_query="query")),
    "a short row": (arrays(jnp.bfloat16, 40, 2, 2, 64), {}),
    "past what VMEM holds": (arrays(jnp.bfloat16, 131_072, 2, 1), {}),
    "past what VMEM holds, tied": (arrays(jnp.bfloat16, 131_072, 1, 1), dict(write_query="query")),
}


# For changes of the kernels: what they hold is in the others too, one by one.
SELDOM = ("exp", "past what VMEM holds, tied")


@pytest.mark.parametrize(
    "inputs, settings",
    [pytest.param(*case, id=name, marks=[pytest.mark.rare] * (name in SELDOM)) for name, case in OTHERS.items()],
)
def test_others(inputs, settings):
    program = compiled(value_and_gradients(implementation="pallas_tpu", **settings), "v5e", (inputs,))
    check(program, inputs, 2)


def test_the_written_values_alone():
    inputs = arrays(jnp.bfloat16, 1024, 2, 2, 64)
    values = lambda x: delta_values(x["key"], x["value"], beta=x["beta"], implementation="pallas_tpu")
    assert compiled(values, "v5e", (inputs,)).kernels == 1
