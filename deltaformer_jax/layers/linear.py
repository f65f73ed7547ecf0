"""Linear maps: the initial values of their kernels, helpers for kernels, and the projection of gates.

    y = x W,    W_ij ~ N(0, scale² / fan_in), truncated at two standard deviations and rescaled to that variance

With scale = 1, y starts with x's variance. Gates have biases; other maps get them by `bias` on request.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx

from deltaformer_jax.ops.common.tiles import accumulation_dtype
from deltaformer_jax.sharding.activations import constrain, into_stream, on_columns, on_own_tokens

# The standard deviation of a standard normal truncated at ±2.
_TRUNCATED_STD = 0.87962566103423978
# The sides that a matrix of a layer may have, by the names of its axes. The heads' side is all heads together.
SIDES = (("embed",), ("mlp",), ("rank",), ("heads", "head_dim"), ("kv_heads", "head_dim"))


def kernel(
    rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str | None, ...], *, fan_in: int = 0, scale: float = 1.0
) -> nnx.Param:
    """A float32 `nnx.Param` of `shape`, drawn as in this module's docstring. `fan_in=0`: shape[0]. It is only used in
    the compute dtype (`cast_kernels`).

    `axes` names the dimensions for sharding; the parameter keeps it as metadata.
    """
    std = scale / math.sqrt(fan_in or shape[0])
    return nnx.Param(truncated_normal(rngs, shape, std), axes=axes, compute=True)


def wide_kernel(rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> nnx.Param:
    """A kernel of a gate, a decay or a convolution, which is used in float32 whatever the compute dtype is."""
    return nnx.Param(truncated_normal(rngs, shape, 1 / math.sqrt(shape[0])), axes=axes)


def input_axes(axes: tuple[str | None, ...]) -> int | None:
    """The number of dimensions *in of a kernel [*in, *out] with these axis names; None if it is no matrix of a layer.

    A matrix has two of SIDES, such as ("embed", "heads", "head_dim"): d_model x (heads * head_dim). No matrix:
    embedding and head ("vocab"), short convolutions ("conv"), gates with one number per head, norms, biases.
    """
    return next((cut for cut in range(1, len(axes)) if axes[:cut] in SIDES and axes[cut:] in SIDES), None)


def cast_kernels(module, dtype):
    """`module` with the parameters that are only used in the compute dtype in `dtype`; the others as they are."""

    def cast(part):
        if not isinstance(part, nnx.Variable) or not part.get_metadata("compute", False):
            return part
        return part.replace(part[...].astype(dtype))

    return jax.tree.map(cast, module, is_leaf=lambda part: isinstance(part, nnx.Variable))


def truncated_normal(rngs: nnx.Rngs, shape: tuple[int, ...], std: float):
    """float32 numbers of mean 0 and standard deviation `std`, all within ±2.3 std."""
    return std / _TRUNCATED_STD * jax.random.truncated_normal(rngs.params(), -2.0, 2.0, shape, jnp.float32)


def product(x, weight: nnx.Param | AdaptedKernel, dtype, axes: int = 1, precision=None):
    """x [..., *in] times a kernel [*in, *out] -> [..., *out]; `axes` is the number of dimensions *in.

    Operands and result are in `dtype`. Computed as a product of two matrices: of arrays with more dimensions, XLA's
    gradient on a CPU first makes transposed copies, which in a small model cost as much as the products.
    """
    if isinstance(weight, AdaptedKernel):
        low = product(x, weight.down, dtype, axes, precision) * weight.scale
        return product(x, weight.kernel, dtype, axes, precision) + product(low, weight.up, dtype, 1, precision)
    return _product(x, weight[...].astype(dtype), dtype, axes, precision)


def _product(x, numbers, dtype, axes: int = 1, precision=None):
    width = math.prod(numbers.shape[:axes])
    rows = x.astype(dtype).reshape(-1, width)
    out = jnp.matmul(rows, numbers.reshape(width, -1), precision=precision)
    return out.reshape(*x.shape[: x.ndim - axes], *numbers.shape[axes:])


def products(x, weights: list[nnx.Param | AdaptedKernel], dtype) -> list:
    """`product` of x [..., in] with each of several kernels [in, *out].

    On a mesh, x's gradient is summed once, if no kernel has adapters.
    """
    if any(isinstance(weight, AdaptedKernel) for weight in weights):
        return [product(x, weight, dtype) for weight in weights]
    numbers = [weight[...].astype(dtype) for weight in weights]
    return on_columns(lambda x, numbers: [_product(x, w, dtype) for w in numbers], x, numbers, [1] * len(weights))


def product_into_stream(x, weight: nnx.Param | AdaptedKernel, dtype, axes: int = 1):
    """`product` of x [B,T,*in] with a kernel [*in, d_model] that ends a residual branch: [B,T,d_model]."""
    if isinstance(weight, AdaptedKernel):
        return product(x, weight, dtype, axes)
    return into_stream(lambda x, numbers: _product(x, numbers, dtype, axes), x, weight[...].astype(dtype))


def product_of_low_rank(x, weight: nnx.Param | AdaptedKernel, dtype, precision=None):
    """`product` of x [B,T,d_model] with a kernel [d_model, rank], which no mesh axis but "fsdp" cuts."""
    if isinstance(weight, AdaptedKernel):
        return product(x, weight, dtype, precision=precision)
    multiply = lambda x, numbers: _product(x, numbers, dtype, precision=precision)
    return on_own_tokens(multiply, x, weight[...].astype(dtype))


def product_of_heads(x, weight: nnx.Param):
    """x [B,T,d_model] times a kernel [d_model, heads] of one number per head -> [B,T,heads], in x's dtype.

    On a mesh every device computes those of all heads: the kernel is small, and the gradient of x is not.
    """
    whole = constrain(weight[...].astype(x.dtype), "embed", "gates")
    multiply = lambda x, numbers: _product(x, numbers, x.dtype, precision="highest")
    return constrain(on_own_tokens(multiply, x, whole), "batch", "tokens", "gates")


def bias(shape: tuple[int, ...], axes: tuple[str | None, ...]) -> nnx.Param:
    """A float32 bias that starts at 0 and gets no weight decay."""
    return nnx.Param(jnp.zeros(shape, jnp.float32), axes=axes, decay=False)


def plus(x, parameter: nnx.Param | None):
    """x + b in x's dtype, or x if there is no b."""
    return x if parameter is None else x + along(parameter, x).astype(x.dtype)


def along(parameter, x):
    """The parameter's array with leading axes of length 1 added, up to x's rank.

    It then broadcasts against x even if jax_numpy_rank_promotion is set to "raise".
    """
    numbers = parameter[...]
    return numbers.reshape((1,) * (x.ndim - numbers.ndim) + numbers.shape)


class Adapter(nnx.Param):
    """A parameter of low rank beside a kernel. A model that has any trains these alone."""


class AdaptedKernel(nnx.Module):
    """A kernel W [*in, *out] that is not trained, and beside it a change of rank r that is:

        x W + s (x A) B,    A [*in, r],    B [r, *out]

    It stands in a module in W's place (`layers.adapters.adapt`). `product` computes the formula, so that W needs no
    gradient. A mixer that reads its kernel itself, as kernel[...], gets W + s A B.
    Source: Hu et al., "LoRA", arXiv 2106.09685, section 4.1.
    """

    def __init__(self, kernel: nnx.Param, down: Adapter, up: Adapter, scale: float):
        self.kernel, self.down, self.up, self.scale = kernel, down, up, scale

    @property
    def shape(self) -> tuple[int, ...]:
        return self.kernel.shape

    def __getitem__(self, index):
        return self.merged()[index]

    def merged(self):
        """W + s A B in W's dtype, with the axes over stacked layers that W has."""
        numbers, rank = self.kernel[...], self.down.shape[-1]
        layers = numbers.shape[: numbers.ndim - len(self.kernel.get_metadata("axes"))]
        down, up = self.down[...].reshape(*layers, -1, rank), self.up[...].reshape(*layers, rank, -1)
        return numbers + self.scale * jnp.matmul(down, up, precision="highest").reshape(numbers.shape)


def product_flops(*kernels: nnx.Param | AdaptedKernel | None) -> float:
    """FLOPs per token of products with these kernels: 2 for each number of one layer's kernel. None counts 0.

    A kernel may be stacked over layers; only its named axes are counted. Adapters beside a kernel are counted too.
    """
    found = [part for part in kernels if part is not None and not isinstance(part, AdaptedKernel)]
    found += [part for each in kernels if isinstance(each, AdaptedKernel) for part in (each.kernel, each.down, each.up)]
    return 2.0 * sum(math.prod(part.shape[-len(part.get_metadata("axes")) :]) for part in found)


class Gate(nnx.Module):
    """g = x W + b, one number per head: x [B,T,d_model] -> [B,T,heads], in float32 (float64 for float64).

    W is drawn by `kernel` and b starts at 0, so sigmoid(g) starts around 1/2. `axis` names the heads' dimension for
    sharding ("heads" or "kv_heads"). `bias=False`: without b. The product uses the highest precision: it is small, and
    the error of a gate is multiplied along the whole sequence.
    """

    def __init__(self, d_model: int, heads: int, *, axis: str, bias: bool = True, rngs: nnx.Rngs):
        self.kernel = wide_kernel(rngs, (d_model, heads), ("embed", axis))
        self.bias = nnx.Param(jnp.zeros((heads,), jnp.float32), axes=(axis,)) if bias else None

    def __call__(self, x):
        logits = product_of_heads(x.astype(accumulation_dtype(x.dtype)), self.kernel)
        return logits if self.bias is None else logits + along(self.bias, logits)
