"""Running ops and models on a mesh of devices."""

from deltaformer_jax.sharding.context.axis import CONTEXT_AXIS, of_whole_rows, sequence_is_sharded
from deltaformer_jax.sharding.context.halo import over_previous_tokens
from deltaformer_jax.sharding.over_devices import HEAD_AXES, ROW_AXES, over_devices

__all__ = [
    "CONTEXT_AXIS",
    "HEAD_AXES",
    "ROW_AXES",
    "of_whole_rows",
    "over_devices",
    "over_previous_tokens",
    "sequence_is_sharded",
]
