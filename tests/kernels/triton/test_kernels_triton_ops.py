"""delta_attention and delta_values with the Triton kernels: lowered for CUDA on a machine without a GPU, refused
elsewhere, and left out where nobody names them and something else is compiled for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltaformer_jax import KUCache, Round, delta_attention, delta_values
from deltaformer_jax.ops.common import dispatch
from pallas_kernels.triton import packages

pytestmark = pytest.mark.long

needs_triton = pytest.mark.skipif(
    packages.missing() is not None, reason="Triton and jax-triton are in the dependency group `kernels`, on Linux"
)

SEGMENTS = np.asarray([[1] * 20 + [2] * 30 + [0] * 14, [0] * 10 + [3] * 54], np.int32)


def draw(dtype=jnp.bfloat16, width=32, **more):
    rng = np.random.default_rng(0)
    sizes = dict(query=(4, width), key=(2, width), value=(2, 16), beta=(2,))
    inputs = {name: jnp.asarray(rng.standard_normal((2, 64, *size)), dtype) for name, size in sizes.items()}
    return inputs | {name: jnp.asarray(x, dtype) for name, x in more.items()}


def kernels(function, *arguments, platform="cuda"):
    """How many Triton kernels are called in the program compiled for that platform."""
    text = jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()
    return text.count("@triton_kernel_call")


def total(**options):
    return lambda inputs: delta_attention(**inputs, **options).astype(jnp.float32).sum()


# Options; kernels forward; kernels forward and backward.
FORMS = [
    (dict(segment_ids=SEGMENTS), 2, 4),
    (dict(write_query="query"), 1, 2),  # one pass writes and reads
    (dict(write_similarity="linear", read_similarity="linear", write_scale=1.0), 3, 6),  # the inverses first
    (dict(write_similarity=Round(0), read_similarity="exp", segment_ids=SEGMENTS), 3, 6),
]


@needs_triton
@pytest.mark.parametrize("implementation", ["triton", None])
@pytest.mark.parametrize("options, forward, both", FORMS, ids=lambda x: "-".join(x) if isinstance(x, dict) else None)
def test_lowers_for_cuda(implementation, options, forward, both):
    inputs = draw()
    if options.get("write_query") == "query":
        del inputs["beta"]
    loss = total(**options, implementation=implementation)
    assert kernels(loss, inputs) == forward
    assert kernels(jax.value_and_grad(loss), inputs) == both
    if implementation is None:
        assert kernels(loss, inputs, platform="cpu") == 0


@needs_triton
@pytest.mark.parametrize("implementation", ["triton", None])
def test_written_values_alone(implementation):
    inputs = draw()
    del inputs["query"]
    loss = lambda x: delta_values(**x, segment_ids=SEGMENTS, implementation=implementation).astype(jnp.float32).sum()
    assert kernels(loss, inputs) == 1
    assert kernels(jax.grad(loss), inputs) == 2


@needs_triton
def test_what_the_kernels_lack_is_chunked():
    assert kernels(total(), draw(width=264)) == 0
    with pytest.raises(NotImplementedError, match=r"implementation='triton': .* widths up to 256; .*use None or"):
        delta_attention(**draw(width=264), implementation="triton")
    with jax.enable_x64(True):
        wide = {name: x.astype(jnp.float64) for name, x in draw().items()}
        assert kernels(total(), wide) == 0
        with pytest.raises(NotImplementedError, match=r"implementation='triton': .*float64"):
            delta_attention(**wide, implementation="triton")


@needs_triton
@pytest.mark.parametrize("implementation", ["triton", None])
def test_vmap_folds_the_batch(implementation):
    inputs = jax.tree.map(lambda x: x[:, None], draw()) | {"beta": draw()["beta"][:1]}
    axes = ({"query": 0, "key": 0, "value": 0, "beta": None},)
    mapped = jax.vmap(total(segment_ids=SEGMENTS[:1], implementation=implementation), axes)
    assert kernels(mapped, inputs) == 2
    assert kernels(jax.grad(lambda x: mapped(x).sum()), inputs) == 4
    each = jax.vmap(jax.grad(total(segment_ids=SEGMENTS[:1], implementation=implementation)), axes)
    assert kernels(each, inputs) == 4


@needs_triton
def test_one_token():
    inputs = jax.tree.map(lambda x: x[:, :1], draw())
    assert kernels(jax.grad(total(implementation="triton")), inputs) == 4


@needs_triton
def test_a_cache_can_be_filled_but_not_gone_on_from():
    ids = (SEGMENTS != 0).astype(np.int32)
    filled = lambda x: delta_attention(**x, segment_ids=ids, implementation="triton", return_cache=True)
    assert kernels(filled, draw()) == 2
    with pytest.raises(NotImplementedError, match="implementation='triton' cannot continue from a cache: use None or"):
        delta_attention(**draw(), implementation="triton", cache=KUCache.empty(2, 64, 2, 2, 32, 16, jnp.bfloat16))


@needs_triton
@pytest.mark.parametrize("implementation", ["triton", None])
def test_no_second_derivative(implementation):
    gradient = jax.grad(total(implementation=implementation))
    twice = jax.grad(lambda x: gradient(x)["query"].astype(jnp.float32).sum())
    with pytest.raises(NotImplementedError, match="hand-written backward pass and no second derivative"):
        jax.eval_shape(twice, draw())


@needs_triton
def test_named_it_is_refused_elsewhere():
    message = "implementation='triton' runs on cuda only: use None or 'chunked'"
    with pytest.raises(NotImplementedError, match=message):
        delta_attention(**draw(), implementation="triton")
    with pytest.raises(NotImplementedError, match=message):
        kernels(jax.grad(total(implementation="triton")), draw(), platform="cpu")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_on_a_cpu_none_is_chunked(dtype):
    inputs = draw(dtype)
    results = [
        jax.jit(jax.value_and_grad(total(segment_ids=SEGMENTS, implementation=implementation)))(inputs)
        for implementation in (None, "chunked")
    ]
    jax.tree.map(np.testing.assert_array_equal, *results)


def test_without_the_packages_it_says_which(monkeypatch):
    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda name: None)
    reason = packages.missing.__wrapped__()
    assert reason.startswith("it needs triton and jax-triton and JAX's CUDA plugin: on Linux, pip install")
    absent = dispatch.Backend("cuda", load=None, missing=lambda: reason)
    monkeypatch.setitem(dispatch.BACKENDS["delta"], "triton", absent)
    jax.clear_caches()  # what was compiled for these shapes knows the kernels
    with pytest.raises(NotImplementedError, match=r"implementation='triton': it needs triton .*; use None"):
        delta_attention(**draw(), implementation="triton")
    np.testing.assert_array_equal(delta_attention(**draw()), delta_attention(**draw(), implementation="chunked"))


def test_another_jax_triton_is_refused(monkeypatch):
    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(packages.importlib.metadata, "version", lambda name: "0.4.1")
    assert packages.missing.__wrapped__() == "it needs jax-triton 0.3.x; 0.4.1 is installed"
