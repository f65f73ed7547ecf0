"""Softmax's Triton kernels between two-byte arrays at every tile of the table, compiled for an H100: tensor cores,
shared memory, registers."""

import pytest

pytest.importorskip("triton", reason="Triton is in the dependency group `kernels`, on Linux")

from support.triton_compile import CONFIGURATIONS, compiled, launch_of

from pallas_kernels.triton.delta.table import SHARED_MEMORY

pytestmark = pytest.mark.long

# Bytes a thread spills where it spills at all. The tiles of width 128 were chosen by time, on an H100 (table.py).
SPILLS = {("read_backward", 256): 72, ("write_backward", 256): 56, ("tied_backward", 256): 48}
SPILLS |= {("write_forward", 128): 24, ("write_backward", 128): 160, ("tied_backward", 128): 96}
SPILLS |= {("tied_forward", 128): 200, ("read_backward", 128): 104}

NARROW = [(kernel, width) for kernel, operands, width in CONFIGURATIONS if operands == "narrow"]


@pytest.mark.parametrize("kernel, width", NARROW)
def test_sm_90(kernel, width):
    ptx, shared, spilled = compiled(launch_of(kernel, 90, width, "narrow"), 90)
    assert "wgmma.mma_async" in ptx
    assert shared <= SHARED_MEMORY[90]
    assert spilled <= SPILLS.get((kernel, width), 0)


@pytest.mark.parametrize("similarity", ["relu", "round"])
@pytest.mark.parametrize("kernel", ["write_forward", "read_forward", "read_backward", "write_backward"])
def test_sm_90_other_similarities(kernel, similarity):
    """float32 and documents: the other branches. linear and exp, which have none of their own, are lowered in
    test_kernels_triton_ops.py."""
    ptx, shared, _ = compiled(launch_of(kernel, 90, 64, "exact", similarity, segments=True), 90)
    assert "wgmma.mma_async" in ptx
    assert shared <= SHARED_MEMORY[90]
