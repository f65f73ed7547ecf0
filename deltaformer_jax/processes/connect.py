"""jax.distributed: from here on jax sees the devices of all processes."""

from __future__ import annotations

import jax

from deltaformer_jax.processes import child, common
from deltaformer_jax.processes.place import Place

_FOREVER = 10 * 24 * 3600  # jax's own limits end a process with the trace of a C++ program; the supervisor is faster


def connect(place: Place) -> None:
    """Wait until all processes of the run have come. Nothing may have used a device before.

    If they do not come within `place.wait` seconds, the supervisor ends this process with one line. Raises ValueError
    if this process was told another number of processes than process 0.
    """
    # It would take SIGTERM away from us; `agreement` does what it is for.
    jax.config.update("jax_enable_preemption_service", False)
    child.at("connecting", place.wait)
    jax.distributed.initialize(
        place.coordinator,
        place.count,
        place.index,
        local_device_ids=place.devices,
        cluster_detection_method="deactivate",
        initialization_timeout=_FOREVER,
    )
    child.at("starting", 0)
    # Told without `first`, which needs the devices of as many processes as this one was told of.
    if place.index == 0:
        common.tell_all("place", {"count": place.count, "hub": child.where_the_parent_listens()})
    told = common.told("place")
    child.connected(told["hub"])
    if told["count"] != place.count:
        raise ValueError(
            f"--processes {place.count}: process 0 was started with --processes {told['count']}; start every process "
            "with the same number"
        )
