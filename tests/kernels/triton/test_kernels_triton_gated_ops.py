"""The gated ops with the Triton kernels: lowered for CUDA on a machine without a GPU, refused elsewhere, and left out
where nobody names them and something else is compiled for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.gated_cases import Case, call, draw_cotangents, draw_inputs

from deltaformer_jax.ops.common import dispatch
from pallas_kernels.triton import packages

pytestmark = pytest.mark.long

needs_triton = pytest.mark.skipif(
    packages.missing() is not None, reason="Triton and jax-triton are in the dependency group `kernels`, on Linux"
)

SEGMENTS = np.asarray([[1] * 20 + [2] * 30 + [0] * 14, [0] * 10 + [3] * 54], np.int32)
DELTA = Case(time=64, key_dim=16, value_dim=32, value_heads=4)
LINEAR = Case(time=64, key_dim=16, value_dim=32, delta=False, scale=1.0)
CHANNEL = Case(time=64, key_dim=16, value_dim=32, value_heads=4, decay="channel")
LINEAR_CHANNEL = Case(time=64, key_dim=16, value_dim=32, delta=False, decay="channel")


def kernels(function, *arguments, platform="cuda"):
    """How many Triton kernels are called in the program compiled for that platform."""
    text = jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()
    return text.count("@triton_kernel_call")


def total(case, implementation, segment_ids=None):
    """A number that depends on the output and the final state."""

    def loss(inputs):
        out, final = call(case, inputs, implementation, segment_ids)
        return out.astype(jnp.float32).sum() + final.sum()

    return loss


# A case; segments; kernels forward; kernels forward and backward.
FORMS = [
    (DELTA, SEGMENTS, 3, 9),
    (Case(time=64, decay="none", beta="none"), None, 3, 9),
    (LINEAR, SEGMENTS, 2, 6),
    (CHANNEL, SEGMENTS, 4, 12),
    (LINEAR_CHANNEL, SEGMENTS, 3, 9),
]


@needs_triton
@pytest.mark.parametrize("implementation", ["triton", None])
@pytest.mark.parametrize(
    "case, segments, forward, both", FORMS, ids=["delta", "plain", "linear", "channel", "linear-channel"]
)
def test_lowers_for_cuda(implementation, case, segments, forward, both):
    inputs = draw_inputs(case, 0, jnp.bfloat16)
    loss = total(case, implementation, segments)
    assert kernels(loss, inputs) == forward
    # The backward makes the forward's states again.
    assert kernels(jax.value_and_grad(loss), inputs) == both
    if implementation is None:
        assert kernels(jax.value_and_grad(loss), inputs, platform="cpu") == 0


@needs_triton
def test_the_table_chooses_the_walk(monkeypatch):
    from pallas_kernels.triton.gated.table import CHOSEN_PLANS

    monkeypatch.setitem(CHOSEN_PLANS, (90, True), ("walk", "walk", "stages"))
    jax.clear_caches()  # what was traced for these shapes knows the plan
    for case, forward, both in ((DELTA, 2, 6), (LINEAR, 1, 4), (CHANNEL, 3, 11)):
        loss, inputs = total(case, "triton", SEGMENTS), draw_inputs(case, 0, jnp.bfloat16)
        assert (kernels(loss, inputs), kernels(jax.value_and_grad(loss), inputs)) == (forward, both)
    jax.clear_caches()


@needs_triton
@pytest.mark.parametrize("case, forward, backward", [(DELTA, 3, 6), (LINEAR, 2, 4), (CHANNEL, 4, 8)])
def test_vmap_folds_the_batch(case, forward, backward):
    inputs = jax.tree.map(lambda x: jnp.stack([x, x, x]), draw_inputs(case, 0, jnp.bfloat16))
    mapped = jax.vmap(total(case, "triton", SEGMENTS))
    assert kernels(mapped, inputs) == forward
    # The backward keeps nothing of the forward's: where only gradients are asked for, that is not run.
    assert kernels(jax.vmap(jax.grad(total(case, None, SEGMENTS))), inputs) == backward


@needs_triton
def test_what_the_kernels_lack_is_chunked():
    wide = Case(time=8, key_dim=264)
    assert kernels(total(wide, None), draw_inputs(wide, 0, jnp.float32)) == 0
    with pytest.raises(NotImplementedError, match=r"'triton': .* head dimensions up to 256; .*; use None or"):
        total(wide, "triton")(draw_inputs(wide, 0, jnp.float32))


@needs_triton
def test_one_token_is_a_step_unless_a_kernel_is_named():
    one = Case(time=1)
    inputs = draw_inputs(one, 0, jnp.float32)
    assert kernels(total(one, None), inputs) == 0
    assert kernels(jax.grad(total(one, "triton")), inputs) == 6


@needs_triton
@pytest.mark.parametrize("implementation", ["triton", None])
def test_no_second_derivative(implementation):
    gradient = jax.grad(total(LINEAR, implementation))
    twice = jax.grad(lambda x: gradient(x)["query"].astype(jnp.float32).sum())
    with pytest.raises(NotImplementedError, match="hand-written backward pass and no second derivative"):
        jax.eval_shape(twice, draw_inputs(LINEAR, 0, jnp.float32))


@needs_triton
@pytest.mark.parametrize("case", [DELTA, LINEAR], ids=["delta", "linear"])
def test_named_it_is_refused_elsewhere(case):
    inputs, message = draw_inputs(case, 0, jnp.float32), "implementation='triton' runs on cuda only: use None or"
    with pytest.raises(NotImplementedError, match=message):
        call(case, inputs, "triton")
    with pytest.raises(NotImplementedError, match=message):
        kernels(jax.grad(total(case, "triton")), inputs, platform="cpu")


@pytest.mark.parametrize("case", [DELTA, LINEAR], ids=["delta", "linear"])
def test_on_a_cpu_none_is_chunked(case):
    inputs, cotangents = draw_inputs(case, 0, jnp.float32), draw_cotangents(case, jnp.float32)

    def both(implementation):
        out, pull = jax.vjp(lambda x: call(case, x, implementation, SEGMENTS), inputs)
        return out, pull(cotangents)

    run = jax.jit(both, static_argnums=0)
    jax.tree.map(np.testing.assert_array_equal, run(None), run("chunked"))


def test_without_the_packages_it_says_which(monkeypatch):
    absent = dispatch.Backend("cuda", load=None, missing=lambda: "it needs triton: install it")
    monkeypatch.setitem(dispatch.BACKENDS["gated"], "triton", absent)
    jax.clear_caches()  # what was compiled for these shapes knows the kernels
    inputs = draw_inputs(DELTA, 0, jnp.float32)
    with pytest.raises(NotImplementedError, match="implementation='triton': it needs triton: install it; use None or"):
        call(DELTA, inputs, "triton")
    jax.tree.map(np.testing.assert_array_equal, call(DELTA, inputs, None), call(DELTA, inputs, "chunked"))
