"""The chips that a step can be compiled for, from their makers' data sheets.

Sources, read in November 2026: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}; for the links of TPU v4, Jouppi
et al., arXiv 2304.01433; NVIDIA's H100 data sheet, and a DGX H100's network of 400 Gbit/s for each card.
"""

from __future__ import annotations

from typing import NamedTuple


class Chip(NamedTuple):
    """One chip. JAX shows some chips as two devices: each has half of everything.

    flops: dense bfloat16 FLOPs a second. memory: bytes. bandwidth: of that memory, bytes a second. link: bytes a second
    that the chip receives along one dimension of its slice, by the links of both directions. network: bytes a second
    that it receives from another slice or host. wraps: a dimension closes to a ring if its size is a multiple of this;
    a line has half of a ring's bandwidth. dimensions: of a slice.
    most: the chips of the largest one; None: no such limit.
    """

    name: str
    flops: float
    memory: float
    bandwidth: float
    link: float
    network: float
    wraps: int
    dimensions: int
    most: int | None


GIB = 2**30
# By the name before the colon of a topology.
CHIPS = {
    "v4": Chip("TPU v4", 275e12, 32 * GIB, 1.228e12, 100e9, 6.25e9, 4, 3, 4096),
    "v5e": Chip("TPU v5e", 197e12, 16 * GIB, 0.859e12, 100e9, 3.125e9, 16, 2, 256),
    "v5p": Chip("TPU v5p", 459e12, 95 * GIB, 2.765e12, 200e9, 6.25e9, 4, 3, 8960),
    "v6e": Chip("TPU v6e", 918e12, 32 * GIB, 1.638e12, 200e9, 12.5e9, 16, 2, 256),
    "tpu7x": Chip("TPU7x", 2307e12, 192 * GIB, 7.380e12, 200e9, 12.5e9, 4, 3, 9216),
    # The cards of a host are joined by a switch: one dimension, always a ring.
    "h100": Chip("H100", 989e12, 84_929_347_584, 3.35e12, 450e9, 50e9, 1, 2, None),
}
