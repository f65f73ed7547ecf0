"""A TPU whose cores have too little VMEM for the kernels: refused by name, and the portable form by default."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from deltaformer_jax import delta_attention, gated_delta_rule


def traced(op, kind, implementation):
    """The program's text, lowered for a TPU of this kind."""
    device = AbstractDevice(device_kind=kind, num_cores=1, platform="tpu")
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)
    array = jax.ShapeDtypeStruct((1, 256, 2, 64), jnp.bfloat16)
    with jax.sharding.use_abstract_mesh(mesh):
        call = jax.jit(lambda query, key, value: op(query, key, value, implementation=implementation))
        return call.trace(array, array, array).lower(lowering_platforms=("tpu",)).as_text()


@pytest.mark.parametrize("op", [delta_attention, gated_delta_rule])
def test_v4_takes_the_portable_form(op):
    assert "tpu_custom_call" in traced(op, "TPU v5 lite", None)
    assert "tpu_custom_call" not in traced(op, "TPU v4", None)
    with pytest.raises(NotImplementedError, match=r"up to 60 MiB of a core's VMEM; this TPU has 16 MiB; use None or"):
        traced(op, "TPU v4", "pallas_tpu")
