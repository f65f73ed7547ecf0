"""Products of tiles on the matrix unit, and their operands' types said outright.

A TPU multiplies float32 operands in one bfloat16 pass unless told otherwise, and an interpreter multiplies them
exactly: a kernel that leaves it open is tested for one thing and does another. Here bfloat16 operands take one pass,
float32 ones the six that float32 accuracy costs; sums are float32.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax

# Which dimension of each operand is summed over.
NN = (((1,), (0,)), ((), ()))  # a b
NT = (((1,), (1,)), ((), ()))  # a bᵀ
TN = (((0,), (0,)), ((), ()))  # aᵀ b
BATCHED = (((2,), (1,)), ((0,), (0,)))  # a b of each matrix of a stack


def quotient(a, b: int):
    """a // b of numbers that are not negative. `//` looks at signs, which Mosaic lowers for known devices only, and a
    program may be lowered where there is none."""
    return lax.div(a, jnp.asarray(b, jnp.asarray(a).dtype))


def dot(a, b, dtype, dimensions=NN):
    """The product with operands rounded to `dtype` (bfloat16 or float32), in float32."""
    precision = lax.Precision.HIGHEST if dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(
        a.astype(dtype), b.astype(dtype), dimensions, precision=precision, preferred_element_type=jnp.float32
    )
