"""The gated ops' Triton kernels compiled to machine code: for an H100 at every width, for others at one. No GPU."""

import pytest

pytest.importorskip("triton", reason="Triton is in the dependency group `kernels`, on Linux")

from support.triton_compile import compiled
from support.triton_gated_compile import ALL_KERNELS, CONFIGURATIONS, launch_of, launches

from pallas_kernels.triton.delta.table import SHARED_MEMORY
from pallas_kernels.triton.gated.table import choose

pytestmark = pytest.mark.long

# Bytes a thread spills with two-byte operands, where it spills at all. The float32 kernels, of three TF32 products,
# spill up to 8 kB at width 256; what they are held to is that they compile and fit.
SPILLS = {("gated_read_gradients", 256): 640, ("gated_solve_gradients", 256): 160}

# What a kernel without decay, segments or system leaves out.
LESS = {
    "plain": dict(decay="none", segments=False),
    "linear": dict(delta=False),
    "plain linear": dict(delta=False, decay="none", segments=False),
    "channels": dict(decay="channel", segments=False),
    "linear channels": dict(delta=False, decay="channel"),
}


def _marks(narrow: bool, width: int) -> list:
    """float32 at the larger widths is on demand: it takes longest to compile, and few train with it."""
    return [] if narrow or width == 64 else [pytest.mark.rare]


@pytest.mark.parametrize(
    "kernel, decay, narrow, width", [pytest.param(*one, marks=_marks(*one[2:])) for one in CONFIGURATIONS]
)
def test_sm_90(kernel, decay, narrow, width):
    ptx, shared, spilled = compiled(launch_of(kernel, decay, 90, width, narrow), 90)
    assert "wgmma.mma_async" in ptx
    assert shared <= SHARED_MEMORY[90]
    if narrow:
        assert spilled <= SPILLS.get((kernel, width), 0)


@pytest.mark.parametrize("less", LESS)
def test_sm_90_with_less(less):
    for launch in launches(90, 128, True, **LESS[less]).values():
        ptx, shared, spilled = compiled(launch, 90)
        assert "wgmma.mma_async" in ptx
        assert shared <= SHARED_MEMORY[90]
        assert spilled == 0


# Bytes a thread spills in the walk's kernels, with documents too, at the widths 64 and 128. The stores and loads of
# these numbers are at most 4 % of the instructions of a chunk.
WALK_SPILLS = {"gated_walk": (0, 8), "gated_walk_back": (24, 120), "gated_walk_gradients": (216, 392)}


@pytest.mark.parametrize("width", [64, 128])
def test_the_walk_on_sm_90(width):
    for kernel, launch in launches(90, width, True, plan="walk").items():
        ptx, shared, spilled = compiled(launch, 90)
        assert "wgmma.mma_async" in ptx
        # Two programs of a walk share a multiprocessor, which reserves a kilobyte for each.
        assert shared <= SHARED_MEMORY[90] and ("gradients" in kernel or shared <= 113 * 1024)
        assert spilled <= WALK_SPILLS.get(kernel, (0, 0))[width == 128], (kernel, spilled)


@pytest.mark.parametrize("width", [64, 128])
def test_the_walk_with_a_decay_per_channel_on_sm_90(width):
    found = launches(90, width, True, decay="channel", plan="walk")
    for kernel in ("gated_channel_invert", "gated_channel_walk"):
        ptx, shared, spilled = compiled(found[kernel], 90)
        assert "wgmma.mma_async" in ptx and shared <= SHARED_MEMORY[90] and spilled == 0


def test_the_walk_of_other_widths_and_dtypes_is_refused():
    for width, narrow in ((256, True), (64, False)):
        with pytest.raises(NotImplementedError, match="the plan 'walk' has tiles for two-byte dtypes and head dim"):
            launches(90, width, narrow, plan="walk")


@pytest.mark.rare
@pytest.mark.parametrize("narrow", [True, False])
@pytest.mark.parametrize("capability", [80, 100, 120])
@pytest.mark.parametrize("kernel, decay", ALL_KERNELS)
def test_others(kernel, decay, capability, narrow):
    ptx, shared, _ = compiled(launch_of(kernel, decay, capability, 128 if narrow else 64, narrow), capability)
    assert ("tcgen05.mma" if capability == 100 and narrow else "mma.sync") in ptx
    assert shared <= SHARED_MEMORY[capability]


def test_old_devices_are_refused():
    with pytest.raises(NotImplementedError, match=r"compute capability 8\.0 or more, not 7\.5"):
        choose("gated_read", 75, 64, True)
