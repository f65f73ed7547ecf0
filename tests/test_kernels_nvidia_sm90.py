"""Every two-byte Triton kernel and tile of the table compiled for an H100: tensor cores, shared memory, registers."""

import pytest

pytest.importorskip("triton", reason="Triton is in the dependency group `kernels`, on Linux")

from nvidia_compile import CONFIGURATIONS, compiled, launch_of

from pallas_kernels.nvidia.table import SHARED_MEMORY

# Bytes a thread spills where it spills at all: at no width up to 128.
SPILLS = {
    ("write_forward", 256): 400,
    ("tied_forward", 256): 480,
    ("read_backward", 256): 256,
    ("write_backward", 256): 128,
    ("tied_backward", 256): 128,
}


@pytest.mark.parametrize("kernel, width", [(kernel, width) for kernel, narrow, width in CONFIGURATIONS if narrow])
def test_sm_90(kernel, width):
    ptx, shared, spilled = compiled(launch_of(kernel, 90, width, True), 90)
    assert "wgmma.mma_async" in ptx
    assert shared <= SHARED_MEMORY[90]
    assert spilled <= SPILLS.get((kernel, width), 0)


@pytest.mark.parametrize("similarity", ["relu", "round"])
@pytest.mark.parametrize("kernel", ["write_forward", "read_forward", "read_backward", "write_backward"])
def test_sm_90_other_similarities(kernel, similarity):
    """float32 and documents: the other branches. linear and exp, which have none of their own, are lowered in
    test_kernels_nvidia_ops.py."""
    ptx, shared, _ = compiled(launch_of(kernel, 90, 64, False, similarity, segments=True), 90)
    assert "wgmma.mma_async" in ptx
    assert shared <= SHARED_MEMORY[90]
