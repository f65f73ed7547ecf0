"""A decoding step compiled for an H100, with no GPU at hand: it copies no cache and reads each once."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from deltaformer_jax import LanguageModel, ModelConfig
from deltaformer_jax.compiled.launches import launches
from deltaformer_jax.decoding.generate import decode_step
from deltaformer_jax.training.ahead_of_time.topologies import find_topology, without_cache
from pallas_kernels.triton import packages

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        packages.missing() is not None, reason="JAX's CUDA plugin is in the dependency group `kernels`, on Linux"
    ),
]
BATCH, CAPACITY = 16, 8192  # so that the caches are most of what is read


@pytest.mark.parametrize("mixer, reads", [("delta_former", 2), ("softmax_attention", 2)])
def test_a_step_copies_no_cache_and_reads_each_once(mixer, reads):
    """`reads`: of an array of keys or values of all layers, how many: the keys, and the values."""
    config = ModelConfig(
        vocab_size=256,
        d_model=128,
        num_layers=6,
        num_heads=4,
        num_kv_heads=4,
        head_dim=64,
        mixers=(mixer,),
        compute_dtype="bfloat16",
    )

    def parts():
        model = LanguageModel(config, rngs=nnx.Rngs(0))
        return *nnx.split(model), model.init_cache(BATCH, CAPACITY)

    graphdef, params, cache = nnx.eval_shape(parts)
    device = find_topology("h100").devices[0]
    there = jax.sharding.SingleDeviceSharding(device)
    on = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=there), tree)
    number = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=there)
    key = on(jax.eval_shape(lambda: jax.random.key(0)))
    arguments = (
        graphdef,
        on(params),
        number(jnp.int32, BATCH),
        on(cache),
        key,
        number(jnp.int32),
        number(jnp.float32),
        None,
    )
    with without_cache():
        program = decode_step.lower(*arguments, top_k=0).compile()
    one = 2 * cache[0].memory.key_by_head.size  # bytes of the keys of all layers
    assert program.memory_analysis().temp_size_in_bytes < one / 2
    large = [x.turns * x.bytes for x in launches(program.as_text())[0] if x.turns * x.bytes > one / 2]
    assert len(large) == reads and sum(large) < 1.2 * reads * one, [x / one for x in large]
