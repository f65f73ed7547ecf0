"""Sizes of tiles by kernel, width and architecture: chosen offline, looked up while tracing, never tried at run time."""
from __future__ import annotations
import dataclasses

@dataclasses.dataclass(frozen=True)
class Tile:
    rows: int
    columns: int
    warps: int
    stages: int
    halves: int = 1
