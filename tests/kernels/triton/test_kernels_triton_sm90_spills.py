"""Registers spilled on an H100 by the bfloat16 kernels at width 32, with documents, and with other similarities than
softmax, which test_kernels_triton_sm90.py leaves out: a few numbers, kept outside the loop over pairs of tiles."""

import pytest

pytest.importorskip("triton", reason="Triton is in the dependency group `kernels`, on Linux")

from support.triton_compile import compiled, launch_of

from pallas_kernels.triton.delta.table import SHARED_MEMORY

pytestmark = pytest.mark.long

KERNELS = ["write_forward", "tied_forward", "read_forward", "read_backward", "write_backward", "tied_backward"]
INVERSES = ["forward_inverses", "backward_inverses"]
PAIR_KERNELS = [*INVERSES, "write_forward", "read_forward", "read_backward", "write_backward"]
# Bytes a thread spills of documents' numbers.
WITH_SEGMENTS = {("write_backward", 128, "linear"): 24, ("read_backward", 128, "linear"): 16}
# These tiles were chosen by time, on an H100 (table.py).
BY_TIME = {"write_forward": 0, "tied_forward": 240, "read_backward": 136, "write_backward": 144, "tied_backward": 112}
WITH_SEGMENTS |= {(kernel, 128, "softmax"): spilled for kernel, spilled in BY_TIME.items()}
# Of relu, exp and round.
OTHERS = {"read_backward": 8, "write_backward": 16}


def spilled(kernel, width, operands, segments, similarity=None):
    ptx, shared, spilled = compiled(launch_of(kernel, 90, width, operands, similarity, segments), 90)
    # Blocks of 32 rows, all that fits three products of width 256, are too few for it.
    assert "wgmma.mma_async" in ptx or (width == 256 and kernel in (*INVERSES, "write_forward"))
    assert shared <= SHARED_MEMORY[90]
    return spilled


@pytest.mark.parametrize("kernel", KERNELS)
def test_width_32(kernel):
    assert spilled(kernel, 32, "narrow", False) == 0


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("kernel", KERNELS)
def test_softmax_with_segments(kernel, width):
    assert spilled(kernel, width, "narrow", True) <= WITH_SEGMENTS.get((kernel, width, "softmax"), 0)


@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize("kernel", PAIR_KERNELS)
def test_linear(kernel, width):
    assert spilled(kernel, width, "pair", False) == 0


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("kernel", PAIR_KERNELS)
def test_linear_with_segments(kernel, width):
    assert spilled(kernel, width, "pair", True) <= WITH_SEGMENTS.get((kernel, width, "linear"), 0)


@pytest.mark.parametrize("similarity", ["relu", "exp", "round"])
@pytest.mark.parametrize("kernel", ["read_backward", "write_backward"])
def test_other_similarities(kernel, similarity):
    # Forward they are linear's but for a few instructions.
    assert spilled(kernel, 128, "pair", False, similarity) <= OTHERS[kernel]
