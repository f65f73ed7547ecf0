"""compile: names of topologies, the bandwidth of mesh axes, and a tiny step compiled for eight TPU chips."""

import importlib.util
import json
import os
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from deltaformer_jax import compile as program
from deltaformer_jax import train
from deltaformer_jax.training.ahead_of_time.buffers import Buffer, largest_buffers, total_bytes
from deltaformer_jax.training.ahead_of_time.chips import CHIPS
from deltaformer_jax.training.ahead_of_time.flops import Flops
from deltaformer_jax.training.ahead_of_time.roofline import Roofline, axes_bandwidth, axes_of
from deltaformer_jax.training.ahead_of_time.topologies import Topology, find_topology
from deltaformer_jax.training.watch.peak import peak_flops

# ml_collections loads a config file by it.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is in the dependency group `kernels`, on Linux"
)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v9:2x2", "not known; did you mean v4?"),
        ("nonsense:::", "the chips are v4, v5e, v5p, v6e, tpu7x, h100"),
        ("v5e", "give the shape of the slice too"),
        ("v5e-12", "no such counted name (v5e-4, v5e-8, "),
        ("v5e-4x4", "no such counted name (v5e-4, v5e-8, "),
        ("tpu7x-64", "no such counted name (none)"),
        ("h100:1x2x3", "give HOSTSxCARDS"),
        ("h100:0", "give HOSTSxCARDS"),
        ("v5e:4x4x4", "give 2 sizes of 1 or more for v5e"),
        ("v5p:4x4", "give 3 sizes of 1 or more for v5p"),
        ("v5e:4x", "give 2 sizes"),
        ("0*v5e:4x4", "give the number of slices, 1 or more"),
        ("v6e:32x32", "1024 chips, and the largest slice of v6e has 256; give several slices"),
    ],
)
def test_a_topology_that_nobody_knows_is_one_line(name, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        program.main([f"--topology={name}"])
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error and repr(name) in error and "v5e:16x16" in error


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--topology: give the devices to compile for"),
        (["--topology"], "--topology: give a value"),
        (["--topolgy=v5e:2x2"], "--topolgy: no such flag; did you mean --topology?"),
        (["--topology=v5e:2x2", "--mesh", "fsdp=two"], "--mesh 'fsdp=two': give sizes of axes"),
        (["--topology=v5e:2x2", "--mesh="], "--mesh '': give sizes of axes"),
        (["--topology=v5e:2x2", "--mesh=fsdp=2,fsdp=4"], "gives fsdp twice"),
        (["--topology=v5e:2x2", "--json=/missing/plan.json"], "--json '/missing/plan.json': cannot be written"),
        (["--topology=v5e:2x2", "--workdir=runs/a"], "--workdir: is a flag of train.py"),
        (["--topology=v5e:2x2", "--mesh=fsdb"], "mesh.recipe = 'fsdb'"),
        (
            ["--topology=v5e:2x2", "--mesh=fsdb=2"],
            "--config.mesh.fsdb: no such field; did you mean --config.mesh.fsdp?",
        ),
    ],
)
def test_bad_flags_are_one_line(flags, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        program.main(flags)
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--for=h100"], "--for h100: is for --dry_run; give that too"),
        (["--dry_run", "--for", "h1"], "topology 'h1': not known; did you mean h100?"),
    ],
)
def test_the_dry_run_for_other_devices(flags, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", *flags])
    with pytest.raises(SystemExit, match="2"):
        train.main()
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error


class Device:
    """What the bandwidth of an axis is found from."""

    def __init__(self, **attributes):
        self.__dict__.update(attributes)


def chips(shape, slices=1, cores=1, **more):
    """What JAX shows of slices of this shape: x varies slowest, and the cores of a chip fastest."""
    return [
        Device(coords=place, slice_index=number, core_on_chip=core, **more)
        for number in range(slices)
        for place in np.ndindex(shape)
        for core in range(cores)
    ]


def mesh_of(devices, **axes):
    return Mesh(np.array(devices).reshape(tuple(axes.values())), tuple(axes))


def test_the_axes_of_a_group():
    mesh = mesh_of(chips((2, 2, 2)), data=2, fsdp=2, tensor=2)
    assert axes_of((0, 1), mesh) == ("tensor",)
    assert axes_of((0, 2, 4, 6), mesh) == ("data", "fsdp")
    assert axes_of(tuple(range(8)), mesh) == ("data", "fsdp", "tensor")
    assert axes_of((3,), mesh) == ()


def test_bandwidth_is_that_of_the_dimensions_an_axis_spans():
    """v5e: 100 GB/s a dimension, and half of it if the dimension of 4 chips is a line; a ring needs 16."""
    line = Topology("v5e:4x4", CHIPS["v5e"], (4, 4), 1, chips((4, 4)))
    mesh = mesh_of(line.devices, data=4, fsdp=4)
    assert axes_bandwidth(("fsdp",), mesh, line) == 50e9
    assert axes_bandwidth(("data", "fsdp"), mesh, line) == 100e9
    ring = Topology("v5e:16x16", CHIPS["v5e"], (16, 16), 1, chips((16, 16)))
    mesh = mesh_of(ring.devices, data=16, fsdp=4, tensor=4)
    assert axes_bandwidth(("data",), mesh, ring) == 100e9
    assert axes_bandwidth(("tensor",), mesh, ring) == 50e9  # a part of the ring
    assert axes_bandwidth(("data", "fsdp", "tensor"), mesh, ring) == 200e9


def test_bandwidth_between_slices_hosts_and_cores():
    two = Topology("v5e:4x4", CHIPS["v5e"], (4, 4), 2, chips((4, 4), slices=2))
    assert axes_bandwidth(("data",), mesh_of(two.devices, data=2, fsdp=16), two) == CHIPS["v5e"].network
    cores = Topology("tpu7x:2x2x1", CHIPS["tpu7x"], (2, 2, 1), 1, chips((2, 2, 1), cores=2))
    assert cores.devices_per_chip == 2 and len(cores.devices) == 8
    assert axes_bandwidth(("tensor",), mesh_of(cores.devices, data=4, tensor=2), cores) == CHIPS["tpu7x"].link / 2
    cards = [Device(process_index=host) for host in (0, 0, 1, 1)]
    hosts = Topology("h100:2x2", CHIPS["h100"], (2, 2), 1, cards)
    mesh = mesh_of(cards, data=2, fsdp=2)
    assert axes_bandwidth(("fsdp",), mesh, hosts) == 450e9 and axes_bandwidth(("data",), mesh, hosts) == 50e9


def test_what_is_computed_again():
    flops = Flops(model=100.0, ops=30.0, head=10.0)
    again = {remat: flops.recomputed(remat) for remat in ("none", "operands", "products", "kernels", "block")}
    assert again == {"none": 0.0, "operands": 0.0, "products": 0.0, "kernels": 60.0, "block": 90.0}


def test_a_step_takes_between_the_longest_part_and_their_sum():
    roofline = Roofline(arithmetic=3.0, memory=5.0, communication=1.0)
    assert (roofline.overlapped, roofline.in_turn, roofline.bound) == (5.0, 9.0, "memory")


def test_peaks_are_those_of_the_chips():
    kinds = {"v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite", "h100": "NVIDIA H100 80GB HBM3"}
    assert all(peak_flops(kind) == CHIPS[name].flops for name, kind in kinds.items())
    assert peak_flops("TPU7x") == CHIPS["tpu7x"].flops / 2  # JAX shows a chip as two devices


def test_the_largest_buffers_are_found(tmp_path):
    """On the CPU, whose compiler describes its programs as the others do."""
    from deltaformer_jax.training.ahead_of_time.buffers import dump_options

    new = time.time_ns() % 1_000_003  # a program from the cache of compiled ones would not be written

    @jax.jit
    def f(x):
        with jax.named_scope("square"):
            y = x @ x
        return (y @ x).sum() + new

    f.lower(jax.ShapeDtypeStruct((300, 300), np.float32)).compile(dump_options(str(tmp_path)))
    assert largest_buffers(str(tmp_path), 1) == [Buffer(360_000, "f32[300,300]", "x")]
    assert total_bytes(str(tmp_path)) >= 360_000


def run(*flags, **variables):
    """In a process of its own: libtpu stays loaded in the process that has loaded it."""
    return subprocess.run(
        [sys.executable, "-m", "deltaformer_jax.compile", *flags],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"JAX_PLATFORMS": "cpu", **variables},
    )


@needs_libtpu
@pytest.mark.long
def test_a_tiny_step_for_eight_chips(tmp_path):
    small = ["--config.data.batch_size=16", "--config.model.num_layers=1", f"--json={tmp_path / 'plan.json'}"]
    cache = tmp_path / "cache"
    done = run("--topology=v5e-8", "--mesh=data=2,fsdp=2,tensor=2", *small, JAX_COMPILATION_CACHE_DIR=str(cache))
    assert done.returncode == 0, done.stderr
    assert not list(cache.glob("jit_step*"))  # where jax could not read it
    for line in (
        "devices     v5e:2x4: 8 x TPU v5e",
        "mesh        data 2, fsdp 2, expert 1, tensor 2",
        "fits: ",
        "bound by",
    ):
        assert line in done.stdout
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["fits"] and plan["devices"] == plan["chips"] == 8 and plan["tokens"] == 16 * 128
    # Parameters are gathered, and reductions go along the axes that split the batch and the heads.
    sent = {(tuple(row["axes"]), row["kind"]): row["bytes"] for row in plan["sent"]}
    assert sent[("fsdp",), "all-gather"] > 0 and any("tensor" in axes for axes, _ in sent)
    assert all(set(axes) <= {"data", "fsdp", "tensor"} for axes, _ in sent)
    seconds = plan["seconds"]
    assert seconds["in_turn"] == pytest.approx(sum(seconds[part] for part in Roofline._fields))


@needs_libtpu
@pytest.mark.long
def test_a_step_that_does_not_fit_names_its_largest_arrays():
    wide = ["--config.model.mlp_dim=4194304", "--config.model.num_layers=2", "--config.data.batch_size=4"]
    done = run("--topology=v5e:2x2", *wide)
    assert done.returncode == 1, done.stderr
    assert "DOES NOT FIT: " in done.stdout and "of 16.00 GiB on a device" in done.stdout
    assert "mlp" in done.stdout.partition("the largest arrays")[2].partition("sent by")[0]


@needs_libtpu
@pytest.mark.long
def test_topologies_by_their_names():
    names = {"v4-16": [8, 8], "v5p-128": [64, 64], "2*v5e:4x4": [32, 32], "tpu7x:4x4x2": [64, 32]}
    code = f"""
from deltaformer_jax.config import MeshConfig
from deltaformer_jax.sharding.mesh import make_mesh
from {find_topology.__module__} import find_topology
for name in {list(names)}:
    found = find_topology(name)
    make_mesh(MeshConfig(fsdp=4, tensor=2), found.devices)
    print(len(found.devices), found.chips)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert [list(map(int, line.split())) for line in done.stdout.splitlines()] == list(names.values()), done.stderr
