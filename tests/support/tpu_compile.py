"""Compiles programs for TPUs with libtpu, without a TPU.

Only for the long tests, which run separately: in a process that has loaded libtpu 0.0.52, jax.profiler of jax 0.10.2
crashes when a trace is started, and an ordinary test starts one.
"""

import os

# Without these, libtpu asks a cloud's metadata server and refuses to be loaded by a second process.
os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}

import functools
from typing import Any, NamedTuple

import jax
import pytest
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, SingleDeviceSharding

from deltaformer_jax.training.ahead_of_time.topologies import without_cache

pytest.importorskip("libtpu", reason="libtpu is in the dependency group `kernels`, on Linux")

TPUS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
EVERY_TPU = ["v5e", *(pytest.param(name, marks=pytest.mark.rare) for name in TPUS if name != "v5e")]


@functools.cache
def device(name):
    topology = topologies.get_topology_desc(platform="tpu", topology_name=TPUS[name])
    return topology.devices[0]


class Compiled(NamedTuple):
    """kernels: the number of kernel calls in the program. memory: the memory analysis of the compiled program.

    Kernel calls are counted before compilation, since this jaxlib cannot print some programs compiled for 7x.
    """

    kernels: int
    memory: Any


def compiled(function, name, arguments):
    """function(*arguments) compiled for one core of the TPU `name`; arguments are trees of ShapeDtypeStructs."""
    one = device(name)
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=SingleDeviceSharding(one))
    kind = AbstractDevice(device_kind=one.device_kind, num_cores=1, platform="tpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=kind)):
        lowered = jax.jit(function).trace(*jax.tree.map(place, arguments)).lower()
        with without_cache():
            return Compiled(lowered.as_text().count("@tpu_custom_call"), lowered.compile().memory_analysis())
