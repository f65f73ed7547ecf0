"""65,536 tokens on eight simulated devices: the forms over a mesh axis and the op of one device, on demand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from context_cases import AXIS, compare, draw

from deltaformer_jax import causal_attention, delta_attention, gated_delta_rule
from deltaformer_jax.sharding.context.chain import delta_attention_pipeline
from deltaformer_jax.sharding.context.heads import over_heads
from deltaformer_jax.sharding.context.ring import causal_attention_ring
from deltaformer_jax.sharding.context.states import gated_delta_rule_states

pytestmark = [pytest.mark.long, pytest.mark.rare]

LENGTH = 65_536
# The other tests compile much and run little; these run for minutes, in half of the time with XLA's optimisations.
OPTIMISED = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}

FORMS = {
    "pipeline": (functools.partial(delta_attention_pipeline, AXIS), delta_attention, 1),
    "heads": (lambda **arrays: over_heads(delta_attention, arrays, AXIS), delta_attention, 8),
    "ring": (functools.partial(causal_attention_ring, AXIS), causal_attention, 1),
    "states": (
        lambda **arrays: gated_delta_rule_states(AXIS, **arrays)[0],
        lambda **arrays: gated_delta_rule(**arrays)[0],
        1,
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_65536_tokens(name):
    form, op, heads = FORMS[name]
    # Documents of 3 to 30,000 tokens, most of which cross a device, and padding at the end. With eight heads, of which
    # each device computes one on the whole row, they are shorter, since the one device takes longest.
    lengths = [1000, 20_000, 3, 30_000, 9_533, 4_000] if heads == 1 else [1000, *[2300] * 28]
    ids = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    ids = jnp.asarray(np.pad(ids, (0, LENGTH - len(ids)))[None], jnp.int32)
    sizes = dict(query=(heads, 8), key=(heads, 8), value=(heads, 8)) | ({} if name == "ring" else {"beta": (heads,)})
    arrays = {key: x[:1] for key, x in draw(sizes, LENGTH, jnp.float32).items()}
    if "beta" in arrays:
        arrays["beta"] = jax.nn.sigmoid(arrays["beta"])
    arrays["key"] = arrays["key"] / jnp.linalg.norm(arrays["key"], axis=-1, keepdims=True)
    compare(form, op, arrays, ids, 8, 1e-5, OPTIMISED)
