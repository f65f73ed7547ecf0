"""Registers spilled on an H100 by the bfloat16 kernels at width 32 and with documents, which
test_kernels_nvidia_sm90.py leaves out: none, but for a few of documents' numbers."""

import pytest

pytest.importorskip("triton", reason="Triton is in the dependency group `kernels`, on Linux")

from nvidia_compile import compiled, launch_of

KERNELS = ["write_forward", "tied_forward", "read_forward", "read_backward", "write_backward", "tied_backward"]
# Bytes a thread spills of documents' numbers, outside the loop over pairs of tiles.
WITH_SEGMENTS = {("write_forward", 128): 16, ("tied_forward", 128): 24}


def spilled(kernel, width, segments):
    ptx, _, spilled = compiled(launch_of(kernel, 90, width, True, segments=segments), 90)
    assert "wgmma.mma_async" in ptx
    return spilled


@pytest.mark.parametrize("kernel", KERNELS)
def test_narrow(kernel):
    assert spilled(kernel, 32, False) == 0


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("kernel", KERNELS)
def test_segments(kernel, width):
    assert spilled(kernel, width, True) <= WITH_SEGMENTS.get((kernel, width), 0)
