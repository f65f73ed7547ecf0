"""A config's training step compiled for devices that are not at hand:

    python -m deltaformer_jax.compile --config NAME --topology v5e:16x16 --mesh fsdp=256
                                      [--config.section.field=value ...] [--json FILE]

--config    as for train.py: the name of a packaged config, or a Python file. Default: tiny
--topology  the devices: CHIP:SHAPE, CHIP-COUNT as a cloud names its slices, or SLICES*CHIP:SHAPE. The chips are v4,
            v5e, v5p, v6e, tpu7x and h100 (h100:2x8 is two hosts of eight cards). TPUs need the extra tpu, h100 the
            extra cuda; no device is needed
--mesh      sizes of mesh axes, such as fsdp=64,tensor=4, as --config.mesh.fsdp=64 --config.mesh.tensor=4 gives them; or
            the name of a recipe, such as fsdp, as --config.mesh.recipe=fsdp does
--json      also write the report there

Prints memory of a device by kind, what devices send each other by mesh axis, the step's arithmetic, and the least time
that a step can take, with what bounds it. Exit code 1 if the step does not fit; then the largest arrays are named.
Nothing is allocated or run. Compiling takes minutes.
"""

from __future__ import annotations

import os
import sys

from deltaformer_jax.config.errors import one_line_errors
from deltaformer_jax.host.paths import expand
from deltaformer_jax.host.spelling import nearest

PROGRAM = "deltaformer_jax.compile"
OWN = ("topology", "mesh", "json")
OF_RUNS = ("workdir", "resume", "dry_run", "for", "coordinator", "processes", "process", "wait")  # flags of train.py


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0
    with one_line_errors(PROGRAM):
        own, rest = _split(arguments)
        _check_json(own.get("json"))
        from deltaformer_jax.config.command_line import parse
        from deltaformer_jax.config.files import config_folder
        from deltaformer_jax.host.waiting import say_aside, waiting

        command = parse([PROGRAM, *rest], str(config_folder() / "tiny.py"))
        with waiting("importing jax", say_aside):
            from deltaformer_jax.training.ahead_of_time.report import report
        return report(command.config, own["topology"], own.get("json"))


def _split(arguments: list[str]) -> tuple[dict[str, str], list[str]]:
    """(this program's own flags, the rest with --mesh as fields of the config)."""
    own, rest, left = {}, [], list(arguments)
    while left:
        name, equals, value = left.pop(0).partition("=")
        if name.startswith("-") and name.lstrip("-") in OF_RUNS:
            raise ValueError(f"{name}: is a flag of train.py; nothing is run here, so leave it out")
        if name.removeprefix("--") not in OWN or not name.startswith("--"):
            if name.startswith("--") and (near := nearest(name.removeprefix("--"), OWN)):
                raise ValueError(f"{name}: no such flag; did you mean --{near}?")
            rest.append(name + equals + value)
            continue
        if not equals:
            if not left:
                raise ValueError(f"{name}: give a value")
            value = left.pop(0)
        own[name.removeprefix("--")] = value
    if "topology" not in own:
        raise ValueError("--topology: give the devices to compile for, such as v5e:16x16 or h100:2x8")
    mesh = own.get("mesh")
    if mesh and "=" not in mesh:
        return own, [*rest, f"--config.mesh.recipe={mesh}"]
    axes: list[str] = []
    for part in [] if mesh is None else mesh.split(","):
        axis, equals, size = part.partition("=")
        if not equals or not size.lstrip("-").isdigit():
            raise ValueError(
                f"--mesh {mesh!r}: give sizes of axes, such as fsdp=64,tensor=4, or a recipe, such as fsdp"
            )
        axes.append(axis.strip())
        if axes.count(axis.strip()) > 1:
            raise ValueError(f"--mesh {mesh!r}: gives {axis.strip()} twice; give each axis one size")
        rest.append(f"--config.mesh.{axis.strip()}={size}")
    return own, rest


def _check_json(path: str | None) -> None:
    """Before minutes of compiling: whether a local file can be written there."""
    if path is None or "://" in path:
        return
    whole = os.path.abspath(expand(path))
    if (
        not path
        or os.path.isdir(whole)
        or not os.access(whole if os.path.exists(whole) else os.path.dirname(whole), os.W_OK)
    ):
        raise ValueError(f"--json {path!r}: cannot be written; give the path of a file in a folder that exists")


if __name__ == "__main__":
    sys.exit(main())
