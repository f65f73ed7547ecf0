"""The mixer protocol: what the language model expects of a mixer's class, and the checks of classes and results."""

from __future__ import annotations

import contextlib
import inspect
from typing import Any, Protocol

import jax
from flax import nnx

from deltaformer_jax import ops


class MixerProtocol(Protocol):
    """A causal layer over the tokens of a row: y_t is a function of x_1 … x_t.

        class MyMixer(nnx.Module):
            def __init__(self, d_model: int, *, width: int = 8, rngs: nnx.Rngs): ...
            def __call__(self, x, *, segment_ids=None, positions=None, cache=None): ...
            def init_cache(self, batch: int, capacity: int): ...
            def flops_per_token(self, length: int) -> float: ...

    **Parameters.** A mixer is an nnx.Module. Its parameters are `nnx.Param`s. Each has `axes=(...)`, the names of its
    dimensions: "embed", "heads", "kv_heads" and "mlp" can be sharded; "head_dim", "rank", "conv" and any other name are
    not. Weight decay applies to parameters with two or more names; `decay=False` or `decay=True` on the parameter
    overrides that. Every other attribute of the mixer is static and hashable.

    **Construction.** The model calls `MyMixer(d_model=..., rngs=...)`. It also passes, by keyword, what the constructor
    names:

    * fields of `ModelConfig`, such as num_heads or norm_epsilon. A field whose value leaves the choice to the mixer is
      not passed, so give such an argument a default;
    * `dtype`, the model's compute dtype;
    * `output_scale`, a factor for the initial values of the kernel that ends the residual branch;
    * the overrides in `Mixer(MyMixer, width=3)`, unchanged.

    If the constructor takes `**others`, the arguments of the inherited constructor count as named too. Construction
    runs under `jax.vmap`, once for all layers at the same place in the pattern. Initial values may therefore depend on
    `rngs` only, and each parameter gets a leading axis over those layers. `init_cache` and `flops_per_token` are called
    on this stacked mixer, so they must take sizes from attributes, not from the shapes of parameters.

    **Call.** x is `[B,T,d_model]` in the compute dtype. The mixer returns (y, cache); y has x's shape and dtype.

    * `segment_ids` int `[B,T]` or None. 0 marks padding: its rows of x may hold anything, its rows of y must be finite,
      and no real token may depend on it. Equal non-zero ids mark one document; a token may see only its own document.
    * `positions` int `[B,T]`: the index of each token in its document.
    * `keep` bool `[B,T]`: only to a mixer whose attribute `separator_tokens` holds ids; True where a token is one of
      them. All later tokens of the document see it, behind a window too.
    * `cache`: None, or a cache from `init_cache` or from an earlier call, with one document per row. If it is None, the
      returned cache is None. Otherwise the new tokens follow the tokens in the cache, and the returned cache holds
      both. The same call serves prompts padded on the left or right, pieces of prompts, and single tokens.

    **Caches** are pytrees of arrays whose first axis is the batch. They have an attribute `length`, int32 `[B]`: the
    number of real tokens that each row has seen. The model stacks the caches of the layers at one place in the pattern.
    `deltaformer_jax.layers.caches` has two classes to use.

    **Cost.** `flops_per_token(length)` returns the forward FLOPs per token, the mean over a document of `length`
    tokens; a multiply-add counts 2.
    """

    def __call__(
        self,
        x: jax.Array,
        *,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
        cache: Any = None,
    ) -> tuple[jax.Array, Any]: ...

    def init_cache(self, batch: int, capacity: int) -> Any: ...

    def flops_per_token(self, length: int) -> float: ...


ADVICE = "see MixerProtocol in deltaformer_jax.layers.mixers.protocol"


def check_class(mixer: Any, name: str) -> None:
    """Raise ValueError unless `mixer` is an nnx.Module class with a mixer's methods and call arguments."""
    if not isinstance(mixer, type) or not issubclass(mixer, nnx.Module):
        raise ValueError(f"model.mixers: {name} is not a subclass of flax.nnx.Module; {ADVICE}")
    for method in ("__call__", "init_cache", "flops_per_token"):
        if not callable(getattr(mixer, method, None)):
            raise ValueError(f"model.mixers: {name} has no method {method}; {ADVICE}")
    parameters = inspect.signature(mixer.__call__).parameters.values()
    if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        named = [parameter.name for parameter in parameters]
        if missing := [argument for argument in ("segment_ids", "positions", "cache") if argument not in named]:
            raise ValueError(f"model.mixers: {name}.__call__ has no argument {missing[0]}; {ADVICE}")


def check_cache(cache: Any, batch: int, mixer: Any) -> None:
    """Raise ValueError unless `cache`, from `mixer.init_cache`, has batched arrays and an int32 `length` per row."""
    name = type(mixer).__name__
    if not all(hasattr(leaf, "shape") and leaf.shape[:1] == (batch,) for leaf in jax.tree.leaves(cache)):
        raise ValueError(
            f"model.mixers: the cache of {name} must be a pytree of arrays whose first axis is the batch; {ADVICE}"
        )
    length = getattr(cache, "length", None)
    if getattr(length, "shape", None) != (batch,) or length.dtype != "int32":
        raise ValueError(f"model.mixers: the cache of {name} has no attribute length, int32 [batch]; {ADVICE}")


def check_result(result: Any, x: jax.Array, cache: Any, mixer: Any) -> None:
    """Raise ValueError unless `result` of `mixer(x, cache=cache)` is (y, cache) with unchanged shapes and dtypes."""
    name = type(mixer).__name__
    if not isinstance(result, tuple) or len(result) != 2:
        raise ValueError(f"model.mixers: {name} returned a {type(result).__name__}, not (y, cache); {ADVICE}")
    y, after = result
    if getattr(y, "shape", None) != x.shape or y.dtype != x.dtype:
        found = f"{y.dtype}{list(y.shape)}" if hasattr(y, "shape") else type(y).__name__
        raise ValueError(
            f"model.mixers: {name} returned y {found} for x {x.dtype}{list(x.shape)}: y must have x's shape and dtype"
        )
    with contextlib.suppress(ValueError, TypeError, AttributeError):  # of another structure, which is said below
        after = jax.eval_shape(ops.written, cache, after)
    before, now = (
        jax.tree.map(lambda leaf: f"{leaf.dtype}{list(leaf.shape)}", ops.read_only(tree)) for tree in (cache, after)
    )
    if jax.tree.flatten(before) != jax.tree.flatten(now):
        raise ValueError(
            f"model.mixers: {name} was given the cache {before} and returned {now}: "
            "structure, shapes and dtypes must not change"
        )
