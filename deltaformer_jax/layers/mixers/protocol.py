"""What a mixer is: what the language model calls, whether the class comes with this package or is yours."""

from __future__ import annotations

import contextlib
import inspect
from typing import Any, Protocol

import jax
from flax import nnx

from deltaformer_jax import ops


class MixerProtocol(Protocol):
    """A memory over the tokens of a row: y_t from x_1 … x_t.

        class MyMixer(nnx.Module):
            def __init__(self, d_model: int, *, width: int = 8, rngs: nnx.Rngs): ...
            def __call__(self, x, *, segment_ids=None, positions=None, cache=None): ...
            def init_cache(self, batch: int, capacity: int): ...
            def flops_per_token(self, length: int) -> float: ...

    A mixer is an nnx.Module: its parameters are `nnx.Param`s, each with `axes=(...)`, the names of its dimensions
    ("embed", "heads", "kv_heads", "head_dim", "mlp", "rank", "conv"; any other name is never cut over devices), and, if
    weight decay is not to follow from the number of dimensions, `decay=False` or `True`. Everything else that it keeps
    is static and hashable.

    **Made** as `MyMixer(d_model, rngs=rngs, ...)` with whatever else its constructor names as keywords: fields of
    `ModelConfig` ("num_heads", "norm_epsilon", ...; a field that leaves the choice to the mixer is not passed, so give
    it a default), `dtype` (the model's compute dtype), `output_scale` (what to multiply the initial kernel at the end
    of the residual branch by), and the overrides of its `Mixer(MyMixer, width=3)`, as they stand there. A constructor
    that hands `**others` on is asked for what the one it inherits names. It is made under `jax.vmap`, once for all
    layers of its place in the pattern, so that its values may depend on `rngs` and on nothing else, and its parameters
    get a leading axis over the layers. `init_cache` and `flops_per_token`, which the model asks of all those layers at
    once, therefore take sizes from attributes, not from parameters' shapes.

    **Called** with x `[B,T,d_model]` in the compute dtype; returns (y, cache), y like x.

    * `segment_ids` int `[B,T]` or None: 0 is padding, whose rows may hold anything, must come out finite and be seen by
      nobody; equal non-zero ids are one document, which is all that a token may see.
    * `positions` int `[B,T]`: the index of each token in its document.
    * `cache`: None, and then the cache returned is None; or what `init_cache` or the call before returned, with one
      document a row. The call then goes on after the tokens in it, and returns the cache with the new ones in it.
      Prompts padded left or right, pieces of prompts and single tokens come through this one door.

    **Caches** are pytrees of arrays that lead with the batch, with an attribute `length`, int32 `[B]`: how many real
    tokens each row has seen. The model stacks the caches of the layers of one place in the pattern.
    `deltaformer_jax.layers.caches` has two to use.

    **Cost**: `flops_per_token(length)` is the forward FLOPs a token, the mean over a document of `length` tokens; a
    multiply-add counts 2.
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


ADVICE = "deltaformer_jax.layers.mixers.protocol says what a mixer is"


def check_class(mixer: Any, name: str) -> None:
    """Raise ValueError unless `mixer` is a class whose instances may be mixers."""
    if not isinstance(mixer, type) or not issubclass(mixer, nnx.Module):
        raise ValueError(f"model.mixers: {name} is no class of flax.nnx.Module; {ADVICE}")
    for method in ("__call__", "init_cache", "flops_per_token"):
        if not callable(getattr(mixer, method, None)):
            raise ValueError(f"model.mixers: {name} has no method {method}; {ADVICE}")
    parameters = inspect.signature(mixer.__call__).parameters.values()
    if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        named = [parameter.name for parameter in parameters]
        if missing := [argument for argument in ("segment_ids", "positions", "cache") if argument not in named]:
            raise ValueError(f"model.mixers: {name}.__call__ has no argument {missing[0]}; {ADVICE}")


def check_cache(cache: Any, batch: int, mixer: Any) -> None:
    """Raise ValueError unless `cache`, from `mixer.init_cache`, is a pytree of arrays that knows its length."""
    name = type(mixer).__name__
    if not all(hasattr(leaf, "shape") and leaf.shape[:1] == (batch,) for leaf in jax.tree.leaves(cache)):
        raise ValueError(f"model.mixers: the cache of {name} is no pytree of arrays that lead with the batch; {ADVICE}")
    length = getattr(cache, "length", None)
    if getattr(length, "shape", None) != (batch,) or length.dtype != "int32":
        raise ValueError(f"model.mixers: the cache of {name} has no attribute length, int32 [batch]; {ADVICE}")


def check_result(result: Any, x: jax.Array, cache: Any, mixer: Any) -> None:
    """Raise ValueError unless a call of `mixer` with x and `cache` returned what it should."""
    name = type(mixer).__name__
    if not isinstance(result, tuple) or len(result) != 2:
        raise ValueError(f"model.mixers: {name} returned a {type(result).__name__}, not (y, cache); {ADVICE}")
    y, after = result
    if getattr(y, "shape", None) != x.shape or y.dtype != x.dtype:
        found = f"{y.dtype}{list(y.shape)}" if hasattr(y, "shape") else type(y).__name__
        raise ValueError(f"model.mixers: {name} returned y {found} for x {x.dtype}{list(x.shape)}: make them alike")
    with contextlib.suppress(ValueError, TypeError, AttributeError):  # of another structure, which is said below
        after = jax.eval_shape(ops.written, cache, after)
    before, now = (
        jax.tree.map(lambda leaf: f"{leaf.dtype}{list(leaf.shape)}", ops.read_only(tree)) for tree in (cache, after)
    )
    if jax.tree.flatten(before) != jax.tree.flatten(now):
        raise ValueError(
            f"model.mixers: {name} was given the cache {before} and returned {now}: keep its structure and shapes"
        )
