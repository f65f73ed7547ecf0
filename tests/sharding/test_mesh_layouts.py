"""Meshes by name, over devices whose network they do not fit, and over several slices. TPUs from their descriptions."""

import os

import jax
import numpy as np
import pytest
from jax.experimental import topologies

from deltaformer_jax.config import Config, MeshConfig
from deltaformer_jax.config.checks import check
from deltaformer_jax.sharding.mesh import make_mesh


@pytest.mark.parametrize(
    "config, sizes",
    [
        (MeshConfig(recipe="fsdp"), (1, 8, 1, 1, 1)),
        (MeshConfig(recipe="fsdp+tensor"), (1, 2, 1, 4, 1)),
        (MeshConfig(recipe="fsdp+context"), (1, 2, 1, 1, 4)),
        (MeshConfig(recipe="data+fsdp"), (1, 8, 1, 1, 1)),  # one slice
        (MeshConfig(recipe="fsdp", data=2), (2, 4, 1, 1, 1)),  # a field that is set overrides the recipe
        (MeshConfig(recipe="fsdp+tensor", tensor=2, data=2), (2, 2, 1, 2, 1)),
        (MeshConfig(recipe="fsdp", fsdp=8), (1, 8, 1, 1, 1)),
    ],
)
def test_recipes(config, sizes):
    assert tuple(make_mesh(config).shape.values()) == sizes


def test_recipes_that_cannot_be():
    with pytest.raises(
        ValueError, match=r"data 1 \* fsdp 2 \* expert 1 \* tensor 3 .* = 6 devices \(by mesh.recipe = 'fsdp\+tenso"
    ) as caught:
        make_mesh(MeshConfig(recipe="fsdp+tensor", tensor=3))
    assert str(caught.value).endswith("is that number (on a CPU, JAX_NUM_CPU_DEVICES=8 simulates 8 devices)")
    with pytest.raises(ValueError, match=r"mesh.recipe = 'fsdb': must be one of.*did you mean fsdp"):
        check(Config(mesh=MeshConfig(recipe="fsdb")))


def tpus(name, **more):
    pytest.importorskip("libtpu", reason="describes TPUs; the extra tpu")
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **more).devices)


@pytest.mark.long
def test_devices_that_are_not_cpus_cannot_be_simulated():
    with pytest.raises(ValueError, match=r"but there are 4; set .* so that their product is that number$"):
        make_mesh(MeshConfig(tensor=3), tpus("v5e:2x2"))


@pytest.mark.parametrize(
    "name, sizes",
    [("v5p:4x4x4", (8, 8, 1)), ("v5p:4x4x4", (1, 8, 8)), ("v6e:8x8", (16, 1, 4)), ("v5e:16x16", (1, 256, 1))],
)
def test_any_layout_that_multiplies_to_the_devices(name, sizes):
    devices = tpus(name)
    mesh = make_mesh(MeshConfig(data=sizes[0], fsdp=sizes[1], tensor=sizes[2]), devices)
    assert mesh.devices.shape == (*sizes[:2], 1, sizes[2], 1)
    assert {device.id for device in mesh.devices.flat} == {device.id for device in devices}


def test_slices_are_split_over_the_axes_of_rows():
    devices = tpus("v5e:2x2", num_slices=2)
    assert {device.slice_index for device in devices} == {0, 1}
    mesh = make_mesh(MeshConfig(recipe="data+fsdp"), devices)
    assert mesh.devices.shape == (2, 4, 1, 1, 1)
    slices = np.vectorize(lambda device: device.slice_index)(mesh.devices)
    assert (slices[0] == slices[0, 0]).all() and (slices[1] == slices[1, 0]).all() and slices[0, 0] != slices[1, 0]
    over_both = make_mesh(MeshConfig(recipe="fsdp+tensor"), devices)
    slices = np.vectorize(lambda device: device.slice_index)(over_both.devices)[0, :, 0, :, 0]
    assert slices.shape == (2, 4) and (slices == slices[:, :1]).all()  # tensor stays inside a slice
    with pytest.raises(ValueError, match=r"the 2 slices of the devices cannot be split"):
        make_mesh(MeshConfig(data=1, tensor=8), devices)


class Card:
    platform, device_kind = "gpu", "a card"

    def __init__(self, number, host, process=None):
        self.id, self.slice_index = number, host
        self.process_index = number if process is None else process


@pytest.mark.parametrize(
    ("sizes", "of_hosts"),
    [
        (dict(context=16), [0] * 8 + [1] * 8),
        (dict(tensor=16), [0] * 8 + [1] * 8),
        (dict(context=4, tensor=4), [0] * 2 + [1] * 2),
        (dict(fsdp=2, tensor=8), [0, 1]),
        (dict(recipe="data+fsdp"), [0, 1]),
    ],
)
def test_any_axis_goes_over_hosts_with_gpus(sizes, of_hosts):
    """Each host is a slice to JAX. The axis over hosts is the one that sends least."""
    cards = [Card(8 * host + card, host) for host in range(2) for card in range(8)]
    mesh = make_mesh(MeshConfig(**sizes), cards)
    described = [Card(card.id, 0, card.slice_index) for card in cards]
    planned = make_mesh(MeshConfig(**sizes), described, slice_attribute="process_index")
    assert [card.id for card in planned.devices.flat] == [card.id for card in mesh.devices.flat]
    assert {card.id for card in mesh.devices.flat} == set(range(16))
    hosts = np.vectorize(lambda card: card.slice_index)(mesh.devices)
    (axis,) = (axis for axis in range(5) if (np.diff(hosts, axis=axis) != 0).any())
    assert np.moveaxis(hosts, axis, 0).reshape(len(of_hosts), -1)[:, 0].tolist() == of_hosts


def test_devices_of_other_kinds_are_in_order():
    assert [device.id for device in make_mesh(MeshConfig(data=2, fsdp=4)).devices.flat] == list(
        range(len(jax.devices()))
    )
