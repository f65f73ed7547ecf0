"""The events of NVIDIA GPUs in a profile that `jax.profiler.trace` has written."""

from __future__ import annotations

import glob
from collections.abc import Iterator

from jax.profiler import ProfileData


def device_events(folder: str) -> Iterator[tuple[str, float]]:
    """(name of the HLO instruction, or else of the kernel; seconds) of every kernel and copy in the profile.

    Raises FileNotFoundError if `folder` holds no profile.
    """
    paths = glob.glob(f"{glob.escape(folder)}/**/*.xplane.pb", recursive=True)
    if not paths:
        raise FileNotFoundError(f"{folder}: no profile (*.xplane.pb) in it")
    for path in paths:
        for plane in ProfileData.from_file(path).planes:
            if not plane.name.startswith("/device:GPU"):
                continue
            for line in plane.lines:
                if not line.name.startswith("Stream"):  # other lines sum up what the streams show
                    continue
                for event in line.events:
                    yield dict(event.stats).get("hlo_op", event.name), 1e-9 * event.duration_ns
