"""DIR/NAME.json: the finished cells of an experiment with all settings, rewritten after each cell."""

from __future__ import annotations

import json
import os
import platform
from typing import Any

import jax
from etils import epath

import deltaformer_jax
from deltaformer_jax.host.claim import check_claim
from deltaformer_jax.host.paths import write_whole
from deltaformer_jax.reproduce.unfinished import ADVICE, same_settings


class Notebook:
    """The records of one experiment in one folder: `records[label] = {"settings", "result", "seconds", "machine"}`.

    "machine" is the machine that finished the cell. If a cell was resumed on another machine, "parts" lists the seconds
    of each. Raises ValueError, naming --out or --force, if the file belongs to another experiment or has other
    settings, or if there is a picture without such a file.
    """

    def __init__(self, folder: epath.Path, name: str, quick: bool, cells: list[dict[str, Any]]):
        self.path, self.name, self.quick, self.cells = folder / f"{name}.json", name, quick, cells
        self.records: dict[str, dict[str, Any]] = {}
        self.machine = machine()  # of the first cell
        picture = folder / f"{name}.png"
        if self.path.exists():
            self._read()
        elif picture.exists():
            raise ValueError(f"--out: {picture} is there and no {self.path.name} beside it; {ADVICE}")

    def _read(self) -> None:
        try:
            saved = json.loads(self.path.read_text())
            records = {record["settings"]["label"]: record for record in saved["cells"]}
            quick, name, self.machine = saved["quick"], saved["experiment"], saved["machine"]
            if not all(record["result"] and record["seconds"] >= 0 for record in saved["cells"]):
                raise ValueError
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"--out: {self.path} is not the record of an experiment; {ADVICE}") from None
        if name != self.name:
            raise ValueError(f"--out: {self.path} is the record of {name}, not of {self.name}; {ADVICE}")
        if quick != self.quick:
            held, asked = ("quick", "full") if quick else ("full", "quick")
            raise ValueError(f"--out: {self.path} holds the {held} form and you ask for the {asked} one; {ADVICE}")
        settings = {cell["label"]: cell for cell in self.cells}
        for label, record in records.items():
            if label not in settings or not same_settings(record["settings"], settings[label]):
                raise ValueError(f"--out: {self.path} holds other settings for {label!r} than this version's; {ADVICE}")
        self.records = records

    @property
    def done(self) -> list[dict[str, Any]]:
        """The records of the finished cells, in the order of the cells."""
        return [self.records[cell["label"]] for cell in self.cells if cell["label"] in self.records]

    def add(self, settings: dict[str, Any], result: dict[str, Any], parts: list[dict[str, Any]]) -> None:
        """Record a finished cell. parts: [{"machine", "seconds"}]; the last machine is the one that finished it."""
        check_claim(str(self.path.parent), self.name)
        seconds = round(sum(part["seconds"] for part in parts), 3)
        record = {"settings": settings, "result": result, "seconds": seconds, "machine": parts[-1]["machine"]}
        self.records[settings["label"]] = record if len(parts) == 1 else {**record, "parts": parts}
        self._write()

    def _write(self) -> None:
        page = {
            "experiment": self.name,
            "quick": self.quick,
            "finished": len(self.records) == len(self.cells),
            "seconds": round(sum(record["seconds"] for record in self.records.values()), 3),
            "machine": self.machine,
            "cells": self.done,
        }
        write_whole(self.path, (json.dumps(page, indent=1, ensure_ascii=False) + "\n").encode())


def machine() -> dict[str, Any]:
    """What the results depend on besides the settings: versions, devices and the processor."""
    device = jax.devices()[0]
    return {
        "python": platform.python_version(),
        "jax": jax.__version__,
        "deltaformer_jax": deltaformer_jax.__version__,
        "device": f"{jax.device_count()} × {device.platform} {device.device_kind}",
        "processor": _processor(),
        "cpu cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }


def _processor() -> str:
    """The processor's name; on Linux from /proc/cpuinfo, since platform.processor() is empty there."""
    try:
        with open("/proc/cpuinfo") as lines:
            named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    except OSError:
        named = []
    return named[0] if named else platform.processor() or platform.machine()
