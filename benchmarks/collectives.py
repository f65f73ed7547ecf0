"""What the devices of a TPU send each other in a training step of a config, by kind, in a layer and outside the layers.

    python benchmarks/collectives.py --topology v5e:16x16 [--config NAME] [--config.section.field=value ...]
        [--json FILE]

No TPU is needed: the step is compiled for the topology's devices ahead of time by libtpu, which takes minutes, and the
compiled program is counted (deltaformer_jax/compiled/collectives.py). model.num_layers should be 4 or more, since a
loop of 2 or 3 turns may be unrolled. The flags --config are those of train.py.
"""

from __future__ import annotations

import argparse
import os

from absl import flags as absl_flags

from deltaformer_jax.config.command_line import parse
from deltaformer_jax.config.errors import one_line_errors
from deltaformer_jax.config.files import config_folder

PROGRAM = "benchmarks/collectives.py"
MIB = 2**20


def main():
    parser = argparse.ArgumentParser(
        PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--topology", required=True)
    parser.add_argument("--json")
    flags, rest = parser.parse_known_args()
    os.environ["JAX_PLATFORMS"] = "cpu"  # before jax is imported
    with one_line_errors(PROGRAM, (ValueError, OSError, NotImplementedError, absl_flags.Error)):
        config = parse([PROGRAM, *rest], str(config_folder() / "tiny.py")).config
        rows, title = counted(config, flags.topology)
    from measure import report

    report(title, rows, flags.json)


def counted(config, topology: str) -> tuple[list[dict], str]:
    """(a row for each kind that the step has: MiB that a device sends, in one layer and outside; title)."""
    from deltaformer_jax.compiled.collectives import bytes_by_kind, collectives, in_layers
    from deltaformer_jax.sharding.mesh import make_mesh
    from deltaformer_jax.training.ahead_of_time.topologies import find_topology, without_cache
    from deltaformer_jax.training.dry_run import with_any_vocabulary
    from deltaformer_jax.training.program import Program
    from deltaformer_jax.training.setup import check_batch

    mesh = make_mesh(config.mesh, find_topology(topology).devices)
    check_batch(config, mesh)
    config = with_any_vocabulary(config)
    with without_cache():
        compiled = Program(config, mesh).compile_train_step(config.data)
    found = collectives(compiled.as_text(), mesh.size)
    inside = in_layers(found)
    a_layer, outside = bytes_by_kind(inside), bytes_by_kind(x for x in found if x not in inside)
    parts = config.model.num_layers * config.optimizer.accumulation_steps
    rows = [
        {"kind": kind, "MiB a layer": a_layer[kind] / parts / MIB, "MiB outside": outside[kind] / MIB}
        for kind in a_layer
        if a_layer[kind] or outside[kind]
    ]
    sizes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1)
    return rows, f"{topology}, {mesh.size} devices: {sizes}"


if __name__ == "__main__":
    main()
