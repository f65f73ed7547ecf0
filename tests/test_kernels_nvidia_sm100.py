"""Every Triton kernel and tile of the table compiled for compute capability 10.0, a B200; no GPU is needed."""

import pytest

pytest.importorskip("triton", reason="Triton is in the dependency group `kernels`, on Linux")

from nvidia_compile import CONFIGURATIONS, compiled, launch_of

from pallas_kernels.nvidia.table import SHARED_MEMORY, TABLE, WIDTHS


@pytest.mark.parametrize("kernel, narrow, width", CONFIGURATIONS)
def test_sm_100(kernel, narrow, width):
    if TABLE[100][kernel, narrow][WIDTHS.index(width)] is None:
        with pytest.raises(NotImplementedError, match="no tile"):
            launch_of(kernel, 100, width, narrow)
        return
    ptx, shared, _ = compiled(launch_of(kernel, 100, width, narrow), 100)
    assert ("tcgen05.mma" if narrow else "mma") in ptx
    assert shared <= SHARED_MEMORY[100]
