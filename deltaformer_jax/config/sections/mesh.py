"""The section `mesh`: how many devices each axis of the mesh has."""

import dataclasses

from deltaformer_jax.config.fields import setting


@dataclasses.dataclass
class MeshConfig:
    """Number of devices along each axis of the mesh. The product of the four is the number of devices."""

    data: int = setting(
        -1,
        "Number of devices that split the rows of a batch; each has a copy of the parameters. -1: all devices "
        "that the other axes leave.",
    )
    fsdp: int = setting(
        1,
        "Number of devices that split the rows of a batch, and also the parameters and the optimiser's state "
        "(fully sharded data parallelism).",
    )
    tensor: int = setting(
        1,
        "Number of devices that split the heads, the feed-forward layer's width and the vocabulary (tensor "
        "parallelism).",
    )
    context: int = setting(
        1,
        "Number of devices that split the tokens of each row, for contexts longer than one device's memory holds "
        "(context parallelism).",
    )
