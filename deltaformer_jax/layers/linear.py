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
from deltaformer_jax.sharding.activations import constrain, on_columns

# The standard deviation of a standard normal truncated at ±2.
_TRUNCATED_STD = 0.87962566103423978


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


def product(x, weight: nnx.Param, dtype, axes: int = 1, precision=None):
    """x [..., *in] times a kernel [*in, *out] -> [..., *out]; `axes` is the number of dimensions *in.

    Operands and result are in `dtype`. Computed as a product of two matrices: of arrays with more dimensions, XLA's
    gradient on a CPU first makes transposed copies, which in a small model cost as much as the products.
    """
    return _product(x, weight[...].astype(dtype), dtype, axes, precision)


def _product(x, numbers, dtype, axes: int = 1, precision=None):
    width = math.prod(numbers.shape[:axes])
    rows = x.astype(dtype).reshape(-1, width)
    out = jnp.matmul(rows, numbers.reshape(width, -1), precision=precision)
    return out.reshape(*x.shape[: x.ndim - axes], *numbers.shape[axes:])


def products(x, weights: list[nnx.Param], dtype) -> list:
    """`product` of x [..., in] with each of several kernels [in, *out]. On a mesh, x's gradient is summed once."""
    numbers = [weight[...].astype(dtype) for weight in weights]
    return on_columns(lambda x, numbers: [_product(x, w, dtype) for w in numbers], x, numbers, [1] * len(weights))


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


def product_flops(*kernels: nnx.Param | None) -> float:
    """FLOPs per token of products with these kernels: 2 for each number of one layer's kernel. None counts 0.

    A kernel may be stacked over layers; only its named axes are counted.
    """
    return 2.0 * sum(math.prod(x.shape[-len(x.get_metadata("axes")) :]) for x in kernels if x is not None)


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
        wide = x.astype(accumulation_dtype(x.dtype))
        logits = constrain(product(wide, self.kernel, wide.dtype, precision="highest"), "batch", "tokens", "gates")
        return logits if self.bias is None else logits + along(self.bias, logits)
