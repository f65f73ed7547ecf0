"""Train a language model.

    python -m deltaformer_jax.train [--config NAME|FILE] [--workdir DIR] [--resume] [--config.section.field=value ...]
                                    [--dry_run [--for TOPOLOGY]] [--help_config [WORD]]
                                    [--coordinator HOST:PORT --processes N --process I [--wait SECONDS]]

--config   the name of a config that comes with the package (tiny, the default; deltaformer_340m, ...), or a Python file
           whose get_config() returns a deltaformer_jax.config.Config
--workdir  the folder of the run, also gs://... . If it holds a run, that run is resumed, bit for bit. Without --config
           it keeps its own config. Default: a new folder under runs/
--resume   refuse a --workdir that holds no run, instead of starting a new run there
--dry_run  print parameters, FLOPs per token, shapes, shardings and the memory of a step; allocate and write nothing
--for      with --dry_run: devices that are not here, such as h100 or v5e:16x16, as deltaformer_jax.compile takes them
--coordinator, --processes, --process
           one of several processes that make up the run: where process 0 listens, how many there are, which this is.
           Slurm, Open MPI, Cloud TPU, GKE and JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID tell it too;
           --processes 1 is a run of its own all the same (docs/clusters.md)
--wait     the seconds in which all of them have to come at the start (300)
--help_config  explain every setting (--config.section.field), or those whose name or meaning contains WORD

The first line says whether the run is new or resumed, and at which step. Ctrl-C or SIGTERM finishes the current step,
saves and exits with code 0. A second one stops at once.
"""

import contextlib
import os
import sys
import textwrap
import time
from typing import Any

from deltaformer_jax.config.errors import one_line_errors
from deltaformer_jax.host import called
from deltaformer_jax.host.interruption import Interruption
from deltaformer_jax.processes import child
from deltaformer_jax.processes.place import Place, find

STARTED = time.time()  # before anything slow is imported
MODULE = "deltaformer_jax.train"
HELP_CONFIG = "--help_config"


def main() -> None:
    if {"--help", "-h", "-help", "--helpfull"} & set(sys.argv[1:]):  # before anything slow is imported
        print(usage())
        return
    program = called.name(MODULE)
    if HELP_CONFIG in {argument.partition("=")[0] for argument in sys.argv[1:]}:
        with one_line_errors(program):
            print(_settings(sys.argv[1:]))
        return
    with one_line_errors(program):
        place = child.supervised() or _place(sys.argv)
    if place is not None and child.supervised() is None:
        from deltaformer_jax.processes.supervisor import supervise

        supervise(place, program)  # starts this program again, and never returns
    with child.last_words(lambda: _meet(place)):
        _train(program, place)


def _place(argv: list[str]) -> Place | None:
    """Which of several processes this is; None if it is alone, as for a dry run, which looks at this host alone."""
    return None if {"--dry_run", "-dry_run"} & set(argv) else find(argv, os.environ)


def _meet(place: Place) -> None:
    """Come to the other processes, to tell them what went wrong here."""
    from deltaformer_jax.processes.connect import connect

    print(f"waiting for the other processes, at {place.coordinator}, to tell them of it", flush=True)
    connect(place)


def _train(program: str, place: Place | None) -> None:
    with contextlib.ExitStack() as held:
        stop = held.enter_context(Interruption())
        held.enter_context(child.forwarded(lambda number: stop.receive(number, "the supervisor")))
        with one_line_errors(program):
            from deltaformer_jax.config.command_line import parse
            from deltaformer_jax.config.files import config_folder
            from deltaformer_jax.config.remarks import remarks
            from deltaformer_jax.host.lock import alone
            from deltaformer_jax.host.waiting import say, say_aside, waiting
            from deltaformer_jax.training.workdir import (
                LOCK,
                Standing,
                check_shared,
                has_checkpoint,
                new_workdir,
                standing,
            )

            with waiting("reading the config", say):  # a config with mixers of the user's own imports jax
                command = parse(sys.argv, str(config_folder() / "tiny.py"))
            noticed = remarks(command.config)
            if command.dry_run:
                for line in noticed:
                    say_aside(line)
                if command.topology:
                    with waiting("importing jax", say_aside):
                        from deltaformer_jax.training.ahead_of_time.report import report
                    sys.exit(report(command.config, command.topology))
                with waiting("importing jax", say_aside):
                    from deltaformer_jax.training.dry_run import dry_run

                    for line in _unused(command.config):
                        say_aside(line)
                return dry_run(command.config, begun=bool(command.workdir) and has_checkpoint(command.workdir))
            if place is not None:
                say(place.line)
                with stop.aside(), waiting(f"waiting for the other processes, at {place.coordinator}", say):
                    from deltaformer_jax.processes.connect import connect

                    connect(place)
                if place.index > 0:
                    say = _nothing  # what there is to say, process 0 says
            from deltaformer_jax.config.saved import everywhere_the_same
            from deltaformer_jax.host.code import code, variables
            from deltaformer_jax.processes import common

            with waiting("importing jax, to find out whether this is the first of several processes", say):
                workdir = command.workdir or new_workdir(command.name)
                child.tell(workdir=os.path.abspath(workdir) if "://" not in workdir else workdir)
                common.first("lock", lambda: held.enter_context(alone(workdir, LOCK, f"--workdir {workdir}", say)))
            with waiting(f"looking at {workdir}", say):
                looked = common.first("standing", lambda: standing(workdir, command.config, command.resume))
                stands = Standing(*looked)
            mine: dict[str, Any] = {}
            if place is not None:
                mine = {"--workdir": workdir, "--resume": command.resume, **everywhere_the_same(command.config)}
                mine |= {**code(), **variables(os.environ)}
            common.check_same("settings", mine, "start every process of a run with the same code and the same settings")
            check_shared(workdir)
            say(stands.line)
            if stands.finished:
                return None
            for line in noticed:
                say(line)
            with waiting("importing jax", say):
                from deltaformer_jax.training.checkpoints.store import SaveError
                from deltaformer_jax.training.loop import RunError, train
                from deltaformer_jax.training.setup import prepare

                noticed = _unused(command.config)
            for line in noticed:
                say(line)
            prepared = prepare(command.config, workdir, say, started=STARTED)
        with one_line_errors(program, (RunError, SaveError), code=1), child.perhaps_of_another(SaveError):
            train(*prepared, stop)


def _nothing(text: str) -> None:
    pass


def _unused(config: Any) -> list[str]:
    """A line for each field of mixers that none of the model's takes. Imports the mixers, and so jax."""
    from deltaformer_jax.config.fields import rule_of
    from deltaformer_jax.layers.mixers.build import FIELDS, unused_fields

    # Those that must be used are refused later, when the model is made.
    names = [name for name in unused_fields(config.model) if not rule_of(FIELDS[name]).must_be_used]
    values = {name: getattr(config.model, name) for name in names}
    return [
        f"model.{name} = {value!r} is not used: no mixer in model.mixers takes it" for name, value in values.items()
    ]


def _settings(arguments: list[str]) -> str:
    """What --help_config, --help_config=WORD or --help_config WORD asks for. Raises ValueError for anything else."""
    from deltaformer_jax.host.waiting import say_aside, waiting

    flag, _, word = arguments[0].partition("=")
    words = [*([word] if word else []), *arguments[1:]]
    if flag != HELP_CONFIG or len(words) > 1 or (words and words[0].startswith("-")):
        raise ValueError(f"{HELP_CONFIG}: give at most one word after it and nothing else, as in {HELP_CONFIG} rope")
    with waiting("importing the mixers, which say what settings they take", say_aside):
        from deltaformer_jax.help_config import about

        return about(words[0] if words else None)


def usage() -> str:
    from deltaformer_jax.config.files import config_names

    head, tail = __doc__.strip().split(f"python -m {MODULE}", 1)
    begin = called.command(MODULE)
    rest = tail.replace(" " * len(f"python -m {MODULE}"), " " * len(begin), 1)
    names = textwrap.fill(f"Configs that come with the package: {', '.join(config_names())}", 120)
    return f"{head}{begin}{rest}\n\n{names}"


if __name__ == "__main__":
    main()
