"""Reproduce a table or a figure:

    python -m deltaformer_jax.reproduce NAME --out DIR [--quick] [--force]

The program writes DIR/NAME.json (all settings, scores and times, and the machine) and DIR/NAME.png. An interrupted
experiment resumes where it stopped; unfinished work lies in DIR/NAME/. Existing results are never overwritten: --force
first deletes the two files, and those parts of DIR/NAME/ that this program wrote. --quick runs a small form of about
two minutes. Without NAME the program lists the names. Wrong input gives one line on stderr and exit code 2.
"""

import argparse
import io
import sys

from etils import epath

from deltaformer_jax.config.argument_parser import ArgumentParser
from deltaformer_jax.config.errors import one_line_errors
from deltaformer_jax.host import called
from deltaformer_jax.host.interruption import Interruption
from deltaformer_jax.host.lock import alone
from deltaformer_jax.host.paths import expand, to_paste, write_whole
from deltaformer_jax.host.spelling import did_you_mean
from deltaformer_jax.host.waiting import say_aside, waiting
from deltaformer_jax.reproduce.experiment import NAMES, load

PROGRAM = "deltaformer_jax.reproduce"


def main(arguments: list[str] | None = None) -> None:
    listing = "\n".join(f"  {name:14}{about}" for name, (about, _) in NAMES.items())
    parser = ArgumentParser(
        prog=f"python -m {PROGRAM}",
        description="Reproduce a table or a figure of a paper.",
        epilog=f"names:\n{listing}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="the experiment; without it, the names are listed")
    parser.add_argument("--out", type=expand, metavar="DIR", help="folder for NAME.json and NAME.png; may be gs://")
    parser.add_argument("--quick", action="store_true", help="run a small form, about two minutes on two cores")
    parser.add_argument("--force", action="store_true", help="delete the results of NAME in DIR, and start anew")
    flags = parser.parse_args(arguments)
    if flags.name is None:
        print(f"names:\n{listing}")
        return
    with one_line_errors(PROGRAM):
        if flags.name not in NAMES:
            hint = did_you_mean(flags.name, NAMES)
            raise ValueError(f"{flags.name!r} is not an experiment: give one of {', '.join(NAMES)}{hint}")
        if not flags.out:
            raise ValueError("--out: give a folder for the results")
        with alone(flags.out, flags.name, f"--out {flags.out}", say_aside):
            finished = reproduce(flags.name, epath.Path(flags.out), flags.quick, flags.force)
    if not finished:
        again = [flags.name, "--out", flags.out, *(["--quick"] if flags.quick else [])]
        print(f"stopped; to go on: {called.command(PROGRAM)} {to_paste(*again)}", file=sys.stderr)
        sys.exit(130)


def reproduce(name: str, out: epath.Path, quick: bool = False, force: bool = False) -> bool:
    """Run the unfinished cells of an experiment, then write its table and figure. False if it was interrupted.

    Raises ValueError or OSError with a one-line message.
    """
    with waiting("importing jax", say_aside):
        from deltaformer_jax.reproduce import unfinished
        from deltaformer_jax.reproduce.notebook import Notebook, machine
        from deltaformer_jax.training.checkpoints.store import SaveError
        from deltaformer_jax.training.loop import RunError

        experiment = load(name)
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out}: is a file; give a folder")
    note = say_aside
    if force:
        for path in (out / f"{name}.json", out / f"{name}.png"):
            path.unlink(missing_ok=True)
        if left := unfinished.remove_all(out / name):
            note(f"{out / name}: {left[0]} was not made by this program and stays there")
    cells = experiment.cells(quick)
    notebook = Notebook(out, name, quick, cells)
    out.mkdir(parents=True, exist_ok=True)
    begun = len(notebook.records) < len(cells)
    note(f"{name}: {NAMES[name][0]}\n{experiment.cost}; {len(notebook.records)} of {len(cells)} parts are done")
    with Interruption("stopping after this step, keeping what is done") as stop:
        for number, settings in enumerate(cells, 1):
            if settings["label"] in notebook.records:
                continue
            if stop.requested:
                return False
            note(f"[{number}/{len(cells)}] {settings['label']}")
            folder = out / name / settings["label"].replace(" ", "_")
            clock = unfinished.Clock(folder, stop, machine())
            try:
                result = experiment.run(settings, folder, note, clock)
            except (RunError, SaveError) as error:  # such as a full disk
                raise OSError(str(error)) from error
            if result is None:
                clock.save()
                if not (folder / unfinished.MARKER).exists():
                    note("this part keeps nothing of its unfinished work; it begins anew next time")
                return False
            notebook.add(settings, result, clock.parts)
            unfinished.release(folder)
    show(experiment.rows(notebook.done))
    drawn = out / f"{name}.png"
    if begun or not drawn.exists():
        picture = io.BytesIO()
        experiment.figure(notebook.done).savefig(picture, format="png", dpi=150)
        write_whole(drawn, picture.getvalue())
    print(f"{notebook.path}\n{drawn}")
    return True


def show(rows: list[dict]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for column in rows[0]:
        table.add_column(column, justify="left" if column == next(iter(rows[0])) else "right")
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    Console(width=120 if not sys.stdout.isatty() else None).print(table)


if __name__ == "__main__":
    main()
