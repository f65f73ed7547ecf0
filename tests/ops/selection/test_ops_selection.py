"""keep, initial and window: every form against the sums written out in NumPy, values and gradients."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.ops_cases import CASES, Case, call, case_id, draw_inputs, inverse_norm, poison

from deltaformer_jax import causal_attention, delta_attention
from deltaformer_jax.ops.softmax import api as softmax_api

TIME = 21
KAPPA = {"linear": lambda s: s, "relu": lambda s: np.maximum(s, 0), "exp": np.exp, "softmax": np.exp}


def visible_by_hand(segment_ids, keep, initial, window):
    """bool [B, T, T], token by token from the sentence that defines it."""
    batch, time = segment_ids.shape
    visible = np.zeros((batch, time, time), bool)
    for b, i, j in np.ndindex(batch, time, time):
        if j > i or segment_ids[b, i] == 0 or segment_ids[b, i] != segment_ids[b, j]:
            continue
        position = j - np.flatnonzero(segment_ids[b] == segment_ids[b, j])[0]
        visible[b, i, j] = position < initial or keep[b, j] or i - j < window
    return visible


def weights_by_hand(similarity, scores, visible):
    kappa = KAPPA.get(similarity, lambda s: np.round(s, getattr(similarity, "decimals", 2)))
    weights = np.where(visible, kappa(np.where(visible, scores, 0)), 0)
    total = weights.sum(-1, keepdims=True)
    return weights / np.where(total > 0, total, 1) if similarity == "softmax" else weights


def delta_by_hand(case, inputs, visible):
    """u token by token, then the read of all tokens."""
    q, k, v = (np.asarray(inputs[name]) for name in ("query", "key", "value"))
    w = np.asarray(inputs.get("write_query", q if case.write_query == "query" else k))
    heads = w.shape[2]
    k, v = (np.repeat(x, heads // x.shape[2], 2) for x in (k, v))
    alpha, beta = (np.asarray(inputs.get(name, np.ones(w.shape[:3]))) for name in ("alpha", "beta"))
    scales = [k.shape[3] ** -0.5 if scale is None else scale for scale in (case.write_scale, case.read_scale)]
    u, out = np.zeros_like(v), np.zeros((*q.shape[:3], v.shape[3]))
    for b, h in np.ndindex(q.shape[0], heads):
        strict = visible[b] & (np.tri(k.shape[1], k=-1) > 0)
        a = weights_by_hand(case.write, w[b, :, h] @ k[b, :, h].T * scales[0], strict)
        for t in range(k.shape[1]):
            u[b, t, h] = alpha[b, t, h] * v[b, t, h] - beta[b, t, h] * a[t] @ u[b, :, h]
        group = q.shape[2] // heads
        for r in range(h * group, (h + 1) * group):
            out[b, :, r] = weights_by_hand(case.read, q[b, :, r] @ k[b, :, h].T * scales[1], visible[b]) @ u[b, :, h]
    return out


def draw_rows(seed, time):
    """Segment ids [2, time] with padding before, between and after packed documents, and bools to keep."""
    rng = np.random.default_rng(seed)
    cuts = np.sort(rng.integers(0, time, (2, 5)), axis=1)
    runs = np.sum(np.arange(time)[None, :, None] >= cuts[:, None], axis=2)
    return np.asarray(rng.permutation([0, 3, 2, 0, 1, 4]), np.int32)[runs], rng.random((2, time)) < 0.3


@functools.cache
def compiled(case, window, initial, forms=("recurrent", "parallel", "chunked")):
    """Output and gradients by name of the form, in one program; of the recurrence the output only."""

    @jax.jit
    def run(inputs, segment_ids, keep, cotangent):
        results = {}
        for form in forms:
            op = lambda inputs, form=form: call(
                case, inputs, form, segment_ids, window=window, initial=initial, keep=keep
            )
            out, pullback = jax.vjp(op, inputs)
            results[form] = {"out": out, **(pullback(cotangent)[0] if form != "recurrent" else {})}
        return results

    return run


@pytest.mark.parametrize(
    "case, window, initial",
    [
        (CASES[1], 5, 3),
        (CASES[3], 4, 1),
        pytest.param(CASES[9], 1, 2, marks=pytest.mark.long),
        pytest.param(CASES[10], 6, 0, marks=pytest.mark.long),
        pytest.param(CASES[11], 1, 0, marks=pytest.mark.long),
        pytest.param(CASES[12], 2, 2, marks=pytest.mark.long),
    ],
    ids=lambda x: case_id(x) if isinstance(x, Case) else str(x),
)
def test_delta_attention_sees_only_what_is_visible(case, window, initial, x64):
    """Packed rows with NaN in their padding. Values against NumPy, gradients of the chunked form against JAX's own of
    the parallel one. The similarities, grouped heads and kinds of write query are all among the cases."""
    for seed in range(4):
        segment_ids, keep = draw_rows(seed, case.time)
        inputs = draw_inputs(case, seed, jnp.float64)
        cotangent = jnp.asarray(np.random.default_rng(1).standard_normal((2, case.time, case.heads, case.value_dim)))
        results = compiled(case, window, initial)(
            poison(inputs, segment_ids), segment_ids, keep, poison(cotangent, segment_ids)
        )
        visible = visible_by_hand(segment_ids, keep, initial, window)
        by_hand = np.where((segment_ids != 0)[..., None, None], delta_by_hand(case, inputs, visible), 0)
        expected = {**results["parallel"], "by hand": by_hand}
        # T roundings in each of u's entries, magnified by the solve once forward and once backward.
        bound = 16 * case.time * np.finfo(float).eps * inverse_norm(case, inputs, visible=visible) ** 2
        for form, result in results.items():
            chex.assert_tree_all_finite(result)
            for name, actual in {**result, "by hand": result["out"]}.items():
                error, size = np.abs(actual - expected[name]).max(), max(np.abs(expected[name]).max(), 1)
                assert error <= bound * size, f"{form} {name}, seed {seed}: {error:.1e} > {bound:.1e} · {size:.1e}"


@pytest.mark.parametrize("window, initial, gates", [(1, 2, False), (6, 0, True)])
def test_causal_attention_sees_only_what_is_visible(window, initial, gates, x64, monkeypatch):
    """In chunks of four rows, so that most of what lasts is behind the chunks of a window."""
    monkeypatch.setattr(softmax_api, "default_chunk", lambda length, window: 4)

    @jax.jit
    def run(inputs, segment_ids, keep, cotangent):
        results = {}
        for form in ("recurrent", "parallel", "chunked"):
            options = dict(window=window, initial=initial, keep=keep, segment_ids=segment_ids, implementation=form)
            out, pullback = jax.vjp(lambda inputs, options=options: causal_attention(**inputs, **options), inputs)
            results[form] = {"out": out, **pullback(cotangent)[0]}
        return results

    for seed in range(4):
        segment_ids, keep = draw_rows(seed, TIME)
        rng = np.random.default_rng(seed)
        shapes = dict(query=(4, 5), key=(2, 5), value=(2, 3))
        inputs = {name: jnp.asarray(rng.standard_normal((2, TIME, *shape))) for name, shape in shapes.items()}
        decay, sinks = np.zeros((2, TIME, 4)), {}
        if gates:
            decay, sinks = -(10.0 ** rng.uniform(-3, 1, decay.shape)), {"sinks": jnp.asarray(rng.standard_normal(4))}
            inputs["log_decay"] = jnp.asarray(decay)
        cotangent = jnp.cos(jnp.arange(2 * TIME * 12.0)).reshape(2, TIME, 4, 3)
        results = run({**poison(inputs, segment_ids), **sinks}, segment_ids, keep, cotangent)
        visible = visible_by_hand(segment_ids, keep, initial, window)
        by_hand = np.zeros((2, TIME, 4, 3))
        for b, h in np.ndindex(2, 4):
            total = np.cumsum(np.where(segment_ids[b] != 0, decay[b, :, h], 0))
            scores = inputs["query"][b, :, h] @ inputs["key"][b, :, h // 2].T / np.sqrt(5)
            weights = np.where(visible[b], np.exp(scores + np.minimum(total[:, None] - total[None], 0)), 0)
            total = weights.sum(-1, keepdims=True) + (np.exp(sinks["sinks"][h]) if gates else 0)
            by_hand[b, :, h] = weights / np.where(total > 0, total, 1) @ inputs["value"][b, :, h // 2]
        expected = {**results["recurrent"], "by hand": by_hand}
        for form, result in results.items():
            for name, actual in {**result, "by hand": result["out"]}.items():
                # Convex combinations of at most T terms; a log decay's gradient adds up those of all pairs around it.
                bound = 16 * TIME * TIME * np.finfo(float).eps * max(np.abs(expected[name]).max(), 1)
                assert np.abs(actual - expected[name]).max() <= bound, f"{form} {name}, seed {seed}"


def test_all_visible_is_the_op_without_a_window(x64):
    """Bitwise in "parallel", whose sums run over the same columns in the same order."""
    case = Case(heads=4, kv_heads=2, alpha=True)
    inputs = draw_inputs(case, 0, jnp.float64)
    plain = {name: inputs[name] for name in ("query", "key", "value")}
    wide, all_kept = dict(window=TIME), dict(window=1, keep=np.ones((2, TIME), bool))

    def both(form, more):
        return call(case, inputs, form, **more), causal_attention(**plain, implementation=form, **more)

    run = jax.jit(lambda: {f: [both(f, more) for more in ({}, wide, all_kept)] for f in ("parallel", "chunked")})
    results = run()
    for more in (1, 2):
        for a, b in zip(results["parallel"][0], results["parallel"][more]):
            np.testing.assert_array_equal(a, b)
        chex.assert_trees_all_close(results["chunked"][0], results["chunked"][more], rtol=1e-13)


def test_a_window_passes_over_chunks(x64):
    """40 chunks of which a row sees at most three."""
    case = Case(write_query="query", time=120, chunk=3)
    inputs = draw_inputs(case, 0, jnp.float64)
    segment_ids = np.repeat([[1, 2], [3, 4]], [50, 70], axis=1).astype(np.int32)
    run = compiled(case, 4, 0, ("parallel", "chunked"))
    results = run(inputs, segment_ids, None, jnp.ones((2, 120, 2, 4)))
    chex.assert_trees_all_close(results["parallel"], results["chunked"], rtol=1e-10, atol=1e-11)


def test_chunks_behind_the_window_are_passed_over(x64):
    """20 chunks of three; what lasts before a row's window fills up to seven tiles of its own. Row 0 begins with many
    that last and ends with none, row 1 has a document that ends in the middle, all of whose tokens last."""
    case = Case(heads=4, kv_heads=2, time=60, chunk=3, alpha=True)
    rng = np.random.default_rng(0)
    segment_ids = np.asarray([[1] * 60, [0] * 5 + [3] * 19 + [2] * 30 + [0] * 6], np.int32)
    keep = rng.random((2, 60)) < np.asarray([[0.3], [0.05]])
    keep[0, 30:], keep[1, 5:24] = False, True
    inputs = draw_inputs(case, 0, jnp.float64)
    cotangent = jnp.asarray(rng.standard_normal((2, 60, 4, 4)))
    arguments = poison(inputs, segment_ids), segment_ids, keep, poison(cotangent, segment_ids)
    results = compiled(case, 5, 2, ("parallel", "chunked"))(*arguments)
    chex.assert_trees_all_close(results["parallel"], results["chunked"], rtol=1e-10, atol=1e-11)


X = dict(query=jnp.zeros((2, 6, 4, 8)), key=jnp.zeros((2, 6, 2, 8)), value=jnp.zeros((2, 6, 2, 8)))


@pytest.mark.parametrize("op", [causal_attention, delta_attention])
def test_refusals(op):
    ones = np.ones((2, 6), bool)
    for change, kind, message in [
        (dict(keep=ones), ValueError, "keep and initial need a window: without one every earlier token is visible"),
        (dict(initial=2), ValueError, "keep and initial need a window"),
        (dict(window=2, initial=-1), ValueError, "initial=-1: it must be an integer of at least 0"),
        (dict(window=2, initial=True), ValueError, "initial=True"),
        (dict(window=0), ValueError, "window=0: it must be a positive integer or None"),
        (
            dict(window=2, keep=ones[:, :5]),
            ValueError,
            r"keep must have shape \[batch, time\] = \(2, 6\); it has \(2, 5\)",
        ),
        (dict(window=2, keep=ones.astype(int)), TypeError, "keep has dtype int64: it must be bool"),
        (dict(window=2, keep=[1]), ValueError, "keep must have shape .* it has list"),
    ]:
        with pytest.raises(kind, match=message):
            op(**X, **change)
    # Each call is otherwise one that the kernels could support.
    kernels = ("triton", "pallas_tpu") if op is delta_attention else ("triton", "cudnn", "splash")
    for name in kernels:
        with pytest.raises(NotImplementedError, match=f"implementation='{name}'"):
            op(**{key: x.astype(jnp.bfloat16) for key, x in X.items()}, window=2, keep=ones, implementation=name)
