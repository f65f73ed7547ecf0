"""The ops with implementation="triton", whole: values, and gradients through the op's own rule, against the recurrence.

In the place of jax-triton's call stands one that hands the kernel to Triton's interpreter."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("triton", reason="Triton is in the dependency group `kernels`, on Linux")

from support import gated_cases, ops_cases
from support.triton_worker import Worker

from deltaformer_jax import delta_values
from deltaformer_jax.ops.common import dispatch
from pallas_kernels.triton import launch

pytestmark = pytest.mark.long

SEGMENTS = np.asarray([[1] * 4 + [0] * 3 + [2] * 6, [0] * 2 + [3] * 10 + [0]], np.int32)
TIME = SEGMENTS.shape[1]


@pytest.fixture(scope="module")
def interpreter():
    worker = Worker()
    yield worker
    worker.close()


@pytest.fixture
def on_this_cpu(interpreter, monkeypatch):
    """The kernels, as if this were the platform they are for."""

    def triton_call(*arguments, kernel, out_shape, grid, zeroed_outputs, name, num_warps, num_stages, **rest):
        assert rest.pop("compute_capability") == 90
        count = next(i for i, x in enumerate(arguments) if not isinstance(x, jax.Array))
        scalars = arguments[count:]
        outputs = [(x.shape, x.dtype, i in zeroed_outputs) for i, x in enumerate(out_shape)]
        module = kernel.fn.__module__

        def call(*arrays):
            return interpreter("run_kernel", module, name, list(map(np.asarray, arrays)), outputs, scalars, *grid, rest)

        return jax.pure_callback(call, out_shape, *arguments[:count])

    monkeypatch.setattr(launch, "_jax_triton", lambda: types.SimpleNamespace(triton_call=triton_call))
    for op in ("delta", "gated"):
        here = dispatch.Backend("cpu", dispatch.BACKENDS[op]["triton"].load)
        monkeypatch.setitem(dispatch.BACKENDS[op], "triton", here)


def compare(call, inputs, cotangents, bound=2.0**-14):
    """Values and gradients of `call(inputs, implementation)`; NaN in padding, which comes back as zeros."""
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: x.astype(jnp.float64), inputs)
        out, pull = jax.vjp(lambda x: call(x, "recurrent"), wide)
        expected = out, pull(jax.tree.map(lambda x, y: x.astype(y.dtype), cotangents, out))[0]
    out, pull = jax.vjp(jax.jit(lambda x: call(x, "triton")), inputs)

    def close(found, expected):
        size = max(np.max(np.abs(expected)), 1.0)
        # Float32 of a dozen tokens; 2^-21 a product, and what unit keys or a softmax let it grow by.
        np.testing.assert_allclose(found, expected, rtol=0, atol=bound * size)

    jax.tree.map(close, (out, pull(cotangents)[0]), expected)


DELTA = [
    ops_cases.Case(write_query="heads", heads=4, kv_heads=2, time=TIME, key_dim=8, alpha=True),
    ops_cases.Case(write_query="query", heads=4, kv_heads=2, time=TIME, key_dim=8),
    ops_cases.Case("linear", "exp", write_query="query", write_scale=0.25, time=TIME, alpha=True),
]


@pytest.mark.parametrize("case", DELTA, ids=ops_cases.case_id)
def test_delta_attention(on_this_cpu, case):
    inputs = ops_cases.poison(ops_cases.draw_inputs(case, 0, jnp.float32), SEGMENTS)
    dout = jax.random.normal(jax.random.key(0), (2, TIME, case.heads, case.value_dim))
    compare(lambda x, name: ops_cases.call(case, x, name, SEGMENTS), inputs, dout)


def test_delta_values(on_this_cpu):
    inputs = ops_cases.draw_inputs(ops_cases.Case(time=TIME), 0, jnp.float32)
    del inputs["query"]
    du = jax.random.normal(jax.random.key(0), (2, TIME, 2, 4))
    compare(lambda x, name: delta_values(**x, segment_ids=SEGMENTS, implementation=name), inputs, du)


GATED = [
    gated_cases.Case(time=TIME, value_heads=4, key_dim=8, scale=0.3),
    gated_cases.Case(time=TIME, decay="none", beta="none", state=False),
    gated_cases.Case(time=TIME, delta=False, value_dim=8),
]


@pytest.mark.parametrize("case", GATED, ids=gated_cases.case_id)
def test_gated(on_this_cpu, case):
    inputs = gated_cases.poison(gated_cases.draw_inputs(case, 0, jnp.float32), SEGMENTS)
    call = lambda x, name: gated_cases.call(case, x, name, SEGMENTS)
    compare(call, inputs, gated_cases.draw_cotangents(case, jnp.float32))


def test_rows_of_a_batch_of_batches(on_this_cpu):
    """vmap, of the op and of its gradient."""
    case = gated_cases.Case(time=TIME, value_heads=4)
    inputs = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), gated_cases.draw_inputs(case, 0, jnp.float32))
    loss = lambda x: jnp.sum(jnp.cos(gated_cases.call(case, x, "triton", SEGMENTS)[0]))
    found = jax.vmap(jax.grad(loss))(inputs)
    alone = [jax.grad(loss)(jax.tree.map(lambda x, i=i: x[i], inputs)) for i in range(2)]
    jax.tree.map(lambda both, *each: np.testing.assert_array_equal(both, np.stack(each)), found, *alone)
