"""The section `mesh`: how many devices each axis of the mesh has."""

import dataclasses

from deltaformer_jax.config.fields import setting

# Sizes by name. REST: all devices that the other axes leave. SLICES: the number of slices.
REST, SLICES = -1, -2
RECIPES = {
    "fsdp": {"data": 1, "fsdp": REST},
    "data+fsdp": {"data": SLICES, "fsdp": REST},
    "fsdp+tensor": {"data": 1, "fsdp": REST, "tensor": 4},
    "fsdp+context": {"data": 1, "fsdp": REST, "context": 4},
}


@dataclasses.dataclass
class MeshConfig:
    """Number of devices along each axis of the mesh. The product of the five is the number of devices.

    `recipe` gives sizes by name. A field beside it that is not at its default overrides the recipe's size.
    """

    recipe: str = setting(
        "",
        'Sizes of the axes by name. "fsdp": all devices on fsdp. "data+fsdp": fsdp inside a slice (devices that a fast '
        'network connects), data over the slices. "fsdp+tensor": tensor = 4, the rest on fsdp. "fsdp+context": '
        "context = 4, the rest on fsdp. A size beside it that is not the field's default overrides the recipe's. "
        '"": the fields alone.',
        choices=("", *RECIPES),
    )

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
    expert: int = setting(
        1,
        'Number of devices that split the rows of a batch, and also the experts of layers with feed_forward = "moe" '
        "(expert parallelism). A device computes its experts for the tokens of all of them.",
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
    sequence_parallel: bool = setting(
        False,
        "Whether the devices along tensor split each row's tokens between the products of a layer, in a training step "
        "(sequence parallelism): norms and the residual stream, which every device would otherwise compute and hold "
        "whole. They send as many bytes.",
    )
    zero1: bool = setting(
        False,
        "Whether the devices along data split the optimiser's state too (ZeRO stage 1). Each updates its part of the "
        "parameters and sends it to the others.",
    )
    strict: bool = setting(
        False,
        "Whether a parameter that an axis of the mesh cannot split evenly, and which every device along it therefore "
        "holds whole, is an error. Otherwise it is said once.",
    )
