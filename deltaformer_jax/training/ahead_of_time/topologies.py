"""Devices to compile for, by the name that a cloud gives them. None of them needs to exist here."""

from __future__ import annotations

import contextlib
import math
import os
import re
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache

from deltaformer_jax.host.called import install
from deltaformer_jax.host.spelling import did_you_mean
from deltaformer_jax.training.ahead_of_time.chips import CHIPS, Chip

EXAMPLES = "v5e:16x16, v5p:4x4x4, v6e-64, 2*v5e:16x16 (two slices), h100 or h100:2x8 (two hosts of eight cards)"

# What XLA asks of a device, for an H100 80GB HBM3 (SXM).
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 84929347584 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 7 } runtime_version { major: 12 minor: 8 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""

# The shapes that a cloud's counted names stand for. The names of v4 and v5p count TensorCores, two on a chip.
SQUARES = {4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
CUBES = {
    8: "2x2x1", 16: "2x2x2", 32: "2x2x4", 64: "2x4x4", 128: "4x4x4", 256: "4x4x8", 512: "4x8x8", 1024: "8x8x8",
    2048: "8x8x16", 4096: "8x16x16", 8192: "16x16x16",
}  # fmt: skip
COUNTED = {"v5e": SQUARES, "v5litepod": SQUARES, "v6e": SQUARES, "v4": CUBES, "v5p": CUBES}


class Topology(NamedTuple):
    """`slices` slices of chips, each of shape `shape`. devices: what JAX shows of all of them, in its order."""

    name: str
    chip: Chip
    shape: tuple[int, ...]
    slices: int
    devices: list[jax.Device]

    @property
    def chips(self) -> int:
        return self.slices * math.prod(self.shape)

    @property
    def devices_per_chip(self) -> int:
        return len(self.devices) // self.chips

    @property
    def device_memory(self) -> float:
        """The bytes of one device."""
        return self.chip.memory / self.devices_per_chip

    @property
    def of_cards(self) -> bool:
        return self.chip is CHIPS["h100"]

    @property
    def title(self) -> str:
        of = f"{self.slices} slices of " if self.slices > 1 else ""
        shown = f", {len(self.devices)} devices" if self.devices_per_chip > 1 else ""
        return f"{of}{self.name}: {self.chips} x {self.chip.name}{shown}"


def find_topology(text: str) -> Topology:
    """The topology that `text` names: CHIP:SHAPE, CHIP-COUNT or SLICES*CHIP:SHAPE; see EXAMPLES.

    A GPU's shape is HOSTSxCARDS, CARDS, or nothing for one card. Raises ValueError for a name that is not known, and
    NotImplementedError if the compiler's package is missing.
    """
    found = re.fullmatch(r"(?:(\d+)\*)?([a-z][a-z0-9]*)(?:([:-])([\dx]+))?", text.strip().lower())
    kind = found and found[2].replace("v5litepod", "v5e")
    if kind not in CHIPS:
        near = did_you_mean(kind or text, list(CHIPS), f"; the chips are {', '.join(CHIPS)}")
        raise ValueError(f"topology {text!r}: not known{near}; give for example {EXAMPLES}")
    slices, shape = int(found[1] or 1), found[4] or ""
    if slices < 1:
        raise ValueError(f"topology {text!r}: give the number of slices, 1 or more, before the *, as in {EXAMPLES}")
    if found[3] == "-":
        counted = COUNTED.get(kind, {})
        if not shape.isdigit() or int(shape) not in counted:
            known = ", ".join(f"{kind}-{count}" for count in counted) or "none"
            raise ValueError(f"topology {text!r}: no such counted name ({known}); give its shape, as in {EXAMPLES}")
        shape = counted[int(shape)]
    if kind == "h100":
        shape = shape or "1"
        return _of_cards(text, slices, _sizes(text, kind, shape if "x" in shape else f"1x{shape}"))
    if not shape:
        raise ValueError(f"topology {text!r}: give the shape of the slice too, as in {EXAMPLES}")
    return _of_tpus(text, kind, slices, _sizes(text, kind, shape))


def _sizes(text: str, kind: str, shape: str) -> tuple[int, ...]:
    """`shape` as numbers. Raises ValueError for one that no cloud has, though libtpu may compile for it."""
    chip, sizes = CHIPS[kind], [int(size or 0) for size in shape.split("x")]
    if len(sizes) != chip.dimensions or 0 in sizes:
        form = "HOSTSxCARDS" if kind == "h100" else f"{chip.dimensions} sizes of 1 or more"
        raise ValueError(f"topology {text!r}: give {form} for {kind}, as in {EXAMPLES}")
    if chip.most and math.prod(sizes) > chip.most:
        raise ValueError(
            f"topology {text!r}: {math.prod(sizes)} chips, and the largest slice of {kind} has {chip.most}; give "
            f"several slices, as in {EXAMPLES}"
        )
    return tuple(sizes)


def _of_tpus(text: str, kind: str, slices: int, shape: tuple[int, ...]) -> Topology:
    # libtpu looks for the machine's own chips, by requests to a cloud's metadata server, unless it is told not to; and
    # a second process could not load it.
    wanted = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    for name, value in wanted.items():
        os.environ.setdefault(name, value)
    more: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if kind == "v4":  # whose two cores JAX shows as one device there; libtpu says two unless it is told
        more["chip_config_name"] = "megacore"
    name = f"{kind}:{'x'.join(map(str, shape))}"
    with _one_line(text, "tpu"):
        described = topologies.get_topology_desc(platform="tpu", topology_name=name, **more)
    return Topology(name, CHIPS[kind], shape, slices, described.devices)


def _of_cards(text: str, slices: int, shape: tuple[int, ...]) -> Topology:
    sizes = "x".join(map(str, (slices, *shape)))
    with _one_line(text, "cuda"):
        described = topologies.get_topology_desc(platform="cuda", target_config=H100, topology=sizes)
    return Topology(f"h100:{shape[0]}x{shape[1]}", CHIPS["h100"], shape, slices, described.devices)


@contextlib.contextmanager
def without_cache():
    """Compile without jax's cache of compiled programs, as is needed for devices that are not here.

    jax 0.10 to 0.12 writes a program for a GPU to that cache, but cannot read it without the GPU: it warns and compiles
    again.
    """
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # jax asks once whether there is a cache
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


@contextlib.contextmanager
def _one_line(text: str, extra: str):
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"topology {text!r}: {str(error).splitlines()[0]}; give for example {EXAMPLES}") from None
    except (ImportError, RuntimeError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        need = f"the compiler for it is missing ({reason}); install it: {install(extra)}"
        raise NotImplementedError(f"topology {text!r}: {need}") from None
