"""Every Triton kernel and tile of the table compiled for compute capability 12.0, an RTX 5090; no GPU is needed."""

import pytest

pytest.importorskip("triton", reason="Triton is in the dependency group `kernels`, on Linux")

from nvidia_compile import CONFIGURATIONS, compiled, launch_of

from pallas_kernels.nvidia.table import SHARED_MEMORY, TABLE, WIDTHS


@pytest.mark.parametrize("kernel, narrow, width", CONFIGURATIONS)
def test_sm_120(kernel, narrow, width):
    if TABLE[120][kernel, narrow][WIDTHS.index(width)] is None:
        with pytest.raises(NotImplementedError, match="no tile"):
            launch_of(kernel, 120, width, narrow)
        return
    ptx, shared, _ = compiled(launch_of(kernel, 120, width, narrow), 120)
    assert "mma.sync" in ptx
    assert shared <= SHARED_MEMORY[120]
