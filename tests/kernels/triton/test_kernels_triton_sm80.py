"""Every Triton kernel compiled for compute capability 8.0, an A100; no GPU is needed."""

import pytest

pytest.importorskip("triton", reason="Triton is in the dependency group `kernels`, on Linux")

from support.triton_compile import ONE_WIDTH, compiled, launch_of

from pallas_kernels.triton.delta.table import SHARED_MEMORY

pytestmark = pytest.mark.rare


@pytest.mark.parametrize("kernel, operands, width", ONE_WIDTH)
def test_sm_80(kernel, operands, width):
    ptx, shared, _ = compiled(launch_of(kernel, 80, width, operands), 80)
    assert "mma.sync" in ptx
    assert shared <= SHARED_MEMORY[80]
