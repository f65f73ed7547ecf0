"""Every float32 Triton kernel and tile of the table compiled for an H100. Three TF32 products for one spill registers;
what these kernels are held to is that they compile, use the tensor cores and fit."""

import pytest

pytest.importorskip("triton", reason="Triton is in the dependency group `kernels`, on Linux")

from support.triton_compile import CONFIGURATIONS, compiled, launch_of

from pallas_kernels.triton.delta.table import SHARED_MEMORY

pytestmark = pytest.mark.long

EXACT = [(kernel, width) for kernel, operands, width in CONFIGURATIONS if operands == "exact"]


# Width 256 takes longest to compile, and few train with it in float32: on demand.
@pytest.mark.parametrize(
    "kernel, width", [pytest.param(*one, marks=[pytest.mark.rare] * (one[1] == 256)) for one in EXACT]
)
def test_sm_90(kernel, width):
    ptx, shared, _ = compiled(launch_of(kernel, 90, width, "exact"), 90)
    assert "wgmma.mma_async" in ptx
    assert shared <= SHARED_MEMORY[90]
