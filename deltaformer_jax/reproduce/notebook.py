"""DIR/NAME.json: what has been done of an experiment, with every setting, written anew after each cell."""

from __future__ import annotations

import json
import os
import platform
from typing import Any

import jax
from etils import epath

import deltaformer_jax


class Notebook:
    """The records of one experiment in one folder, `records[label] = {"settings", "result", "seconds"}`.

    Raises ValueError, naming --out or --force, for a file that is not this experiment's, or holds other settings.
    """

    def __init__(self, folder: epath.Path, name: str, quick: bool, cells: list[dict[str, Any]]):
        self.path, self.name, self.quick, self.cells = folder / f"{name}.json", name, quick, cells
        self.records: dict[str, dict[str, Any]] = {}
        if self.path.exists():
            self._read()

    def _read(self) -> None:
        advice = "give another --out, or --force to start anew"
        try:
            saved = json.loads(self.path.read_text())
            records = {record["settings"]["label"]: record for record in saved["cells"]}
            quick = saved["quick"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"--out: {self.path} is no record of an experiment; {advice}") from None
        if quick != self.quick:
            held, asked = (("quick", "full") if quick else ("full", "quick"))
            raise ValueError(f"--out: {self.path} holds the {held} form and you ask for the {asked} one; {advice}")
        settings = {cell["label"]: cell for cell in self.cells}
        for label, record in records.items():
            if settings.get(label) != record["settings"]:
                raise ValueError(f"--out: {self.path} holds other settings for {label!r} than this version's; {advice}")
        self.records = records

    @property
    def done(self) -> list[dict[str, Any]]:
        """The finished cells' records, in the cells' order."""
        return [self.records[cell["label"]] for cell in self.cells if cell["label"] in self.records]

    def add(self, settings: dict[str, Any], result: dict[str, Any], seconds: float) -> None:
        self.records[settings["label"]] = {"settings": settings, "result": result, "seconds": round(seconds, 3)}
        self._write()

    def _write(self) -> None:
        page = {
            "experiment": self.name,
            "quick": self.quick,
            "finished": len(self.records) == len(self.cells),
            "seconds": round(sum(record["seconds"] for record in self.records.values()), 3),
            "machine": machine(),
            "cells": self.done,
        }
        part = self.path.parent / (self.path.name + ".part")  # an interruption leaves the old file or the new one
        part.write_text(json.dumps(page, indent=1, ensure_ascii=False) + "\n")
        part.replace(self.path)


def machine() -> dict[str, Any]:
    """What the numbers depend on beside the settings."""
    device = jax.devices()[0]
    return {
        "python": platform.python_version(),
        "jax": jax.__version__,
        "deltaformer_jax": deltaformer_jax.__version__,
        "device": f"{jax.device_count()} × {device.platform} {device.device_kind}",
        "cpu cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }
