"""in_order: the identity, for every transformation, and no reason to gather a sharded array."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from deltaformer_jax.ops.cache.memory_order import in_order

X = jnp.arange(24.0).reshape(2, 3, 4)


def test_it_is_the_identity():
    square = lambda x: jnp.sum(in_order(x) ** 2)
    np.testing.assert_array_equal(in_order(X), X)
    np.testing.assert_array_equal(jax.jit(in_order)({"a": X})["a"], X)
    np.testing.assert_array_equal(jax.vmap(jax.vmap(in_order))(X), X)
    np.testing.assert_array_equal(jax.grad(square)(X), 2 * X)
    np.testing.assert_array_equal(jax.jvp(jax.grad(square), (X,), (X,))[1], 2 * X)


def test_a_sharded_stack_is_not_gathered():
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), devices=jax.devices()[:4])
    sharding = NamedSharding(mesh, PartitionSpec(None, "data", "tensor"))
    stack = jax.ShapeDtypeStruct((3, 4, 4, 64, 8), jnp.float32, sharding=sharding)

    def total(stack):
        return jax.lax.scan(lambda sums, x: (sums + jnp.sum(in_order(x), -1), None), jnp.zeros((4, 4, 64)), stack)[0]

    lowered = jax.jit(total).lower(stack)
    text = lowered.compile().as_text()
    assert "all-gather" not in text and "all-reduce" not in text
    # On one device the constraint itself is in the program.
    assert "LayoutConstraint" in jax.jit(total).lower(jax.ShapeDtypeStruct(stack.shape, stack.dtype)).as_text()
