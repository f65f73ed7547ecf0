"""Train a language model.

    python train.py [--config NAME|FILE] [--workdir DIR] [--config.section.field=value ...] [--dry_run]
    python -m deltaformer_jax.train ...                     the same, wherever the package is installed

--config   the name of a config that comes with the package (tiny, the default; deltaformer_340m, ...), or a Python file
           whose get_config() returns a deltaformer_jax.config.Config
--workdir  the run's folder, also gs://...; a run that is there goes on, bit for bit, with its own config where --config
           isn't given. Without --workdir: a new folder under runs/
--dry_run  print parameters, FLOPs per token, shapes, shardings and the step's memory; allocate and write nothing

Ctrl-C or SIGTERM finishes the step, saves and exits with 0; a second one stops at once.
"""

import sys

from deltaformer_jax.config.command_line import parse
from deltaformer_jax.config.errors import one_line_errors
from deltaformer_jax.config.files import config_folder
from deltaformer_jax.training.interruption import Interruption


def main() -> None:
    with Interruption() as stop:
        with one_line_errors("train.py"):
            command = parse(sys.argv, str(config_folder() / "tiny.py"), __doc__)
            from deltaformer_jax.training.checkpoints.store import SaveError
            from deltaformer_jax.training.dry_run import dry_run
            from deltaformer_jax.training.loop import RunError, train
            from deltaformer_jax.training.setup import new_workdir, prepare

            if command.dry_run:
                return dry_run(command.config)
            prepared = prepare(command.config, command.workdir or new_workdir(command.name), print)
        with one_line_errors("train.py", (RunError, SaveError), code=1):
            train(*prepared, stop)


if __name__ == "__main__":
    main()
