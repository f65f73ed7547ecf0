"""Running ops and models on a mesh of devices."""

from deltaformer_jax.sharding.over_devices import HEAD_AXES, ROW_AXES, over_devices

__all__ = ["HEAD_AXES", "ROW_AXES", "over_devices"]
