"""Programs compiled for TPUs that are not here, by libtpu alone.

For the long tests, which run by themselves: in a process that has loaded libtpu 0.0.52, jax.profiler of jax 0.10.2 dies
when a trace is started, and an ordinary test starts one.
"""

import os

# libtpu asks a cloud's metadata server and locks itself to one process unless it is told not to.
os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}

import functools
from typing import Any, NamedTuple

import jax
import pytest
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, SingleDeviceSharding

pytest.importorskip("libtpu", reason="libtpu is in the dependency group `kernels`, on Linux")

TPUS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}


@functools.cache
def device(name):
    topology = topologies.get_topology_desc(platform="tpu", topology_name=TPUS[name])
    return topology.devices[0]


class Compiled(NamedTuple):
    """How many calls of kernels a program holds, counted where it was handed to the compiler (some releases of libtpu
    make programs for 7x that this jaxlib cannot print), and what memory its compiled form takes."""

    kernels: int
    memory: Any


def compiled(function, name, arguments):
    """function(*arguments), a tree of ShapeDtypeStructs, compiled for one core of that TPU."""
    one = device(name)
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=SingleDeviceSharding(one))
    kind = AbstractDevice(device_kind=one.device_kind, num_cores=1, platform="tpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=kind)):
        lowered = jax.jit(function).trace(*jax.tree.map(place, arguments)).lower()
        return Compiled(lowered.as_text().count("@tpu_custom_call"), lowered.compile().memory_analysis())
