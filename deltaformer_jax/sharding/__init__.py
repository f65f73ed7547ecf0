"""Running ops and models on a mesh of devices."""

from deltaformer_jax.sharding.over_devices import (
    CONTEXT_AXIS,
    HEAD_AXES,
    ROW_AXES,
    context_devices,
    over_devices,
    over_previous_tokens,
)

__all__ = ["CONTEXT_AXIS", "HEAD_AXES", "ROW_AXES", "context_devices", "over_devices", "over_previous_tokens"]
