"""Registers spilled on an H100 by the bfloat16 kernels at width 32, with documents and with other similarities, which
test_kernels_nvidia_sm90.py leaves out: none by softmax's, but for a few of documents' numbers."""

import pytest

pytest.importorskip("triton", reason="Triton is in the dependency group `kernels`, on Linux")

from nvidia_compile import compiled, launch_of

KERNELS = ["write_forward", "tied_forward", "read_forward", "read_backward", "write_backward", "tied_backward"]
# Bytes a thread spills of documents' numbers, outside the loop over pairs of tiles.
WITH_SEGMENTS = {("write_forward", 128): 16, ("tied_forward", 128): 24}
# Of similarities other than softmax, whose products are three, at width 128.
THREE_PRODUCTS = {"write_forward": 128, "tied_forward": 192, "write_backward": 960, "tied_backward": 960}


def spilled(kernel, width, segments, similarity="softmax"):
    ptx, _, spilled = compiled(launch_of(kernel, 90, width, True, similarity, segments), 90)
    assert "wgmma.mma_async" in ptx
    return spilled


@pytest.mark.parametrize("kernel", KERNELS)
def test_narrow(kernel):
    assert spilled(kernel, 32, False) == 0


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("kernel", KERNELS)
def test_segments(kernel, width):
    assert spilled(kernel, width, True) <= WITH_SEGMENTS.get((kernel, width), 0)


@pytest.mark.parametrize("kernel", KERNELS)
def test_other_similarities(kernel):
    assert spilled(kernel, 128, False, "linear") <= THREE_PRODUCTS.get(kernel, 0)
