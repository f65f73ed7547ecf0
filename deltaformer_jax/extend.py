"""A run's model trained on a longer context, and compared with what it was:

    python -m deltaformer_jax.extend --workdir DIR --to N --out DIR2 [--method longred|mixed|plain] [--steps N]
                                     [--base B] [--tokens N] [--config.section.field=value ...] [--dry_run]

The rotary base becomes the least one, of two digits, with which likeness raises a key's score at every distance up to N
tokens (arXiv 2405.14591), or B. Training goes on from DIR for --steps steps (512) of about as many tokens as before, at
a tenth of the learning rate. DIR2 is a run like any other: it is resumed by the same command or by train.py.

--method longred  long texts, and the streams of short texts held near those of DIR's model (arXiv 2502.07365)
         mixed    long and short texts
         plain    long texts alone

Then DIR2/extension.json and DIR2/extension.png compare both models: loss of short and of long texts by position,
recall of a passage by distance, and drift by layer, on about --tokens tokens (65536) of the evaluation split each. A
table goes to stderr, the JSON to stdout. After training by several processes, the same command in one process
compares. Wrong input gives one line on stderr and exit code 2, and nothing is written.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from etils import epath

from deltaformer_jax.config.argument_parser import ArgumentParser
from deltaformer_jax.config.command_line import OWN
from deltaformer_jax.config.errors import one_line_errors
from deltaformer_jax.config.saved import Saved
from deltaformer_jax.extension import METHODS
from deltaformer_jax.host import processes
from deltaformer_jax.host.columns import right_aligned
from deltaformer_jax.host.paths import expand
from deltaformer_jax.host.spelling import did_you_mean
from deltaformer_jax.host.waiting import say_aside, waiting

FILE = "extension.json"


def main(arguments: list[str] | None = None) -> None:
    parser = ArgumentParser(
        prog="python -m deltaformer_jax.extend",
        description="A run's model trained on a longer context, and compared with what it was. Other flags are those "
        "of train.py: --config.section.field=value, --dry_run, --coordinator, ...",
    )
    parser.add_argument("--workdir", type=expand, required=True, metavar="DIR", help="the run's folder")
    parser.add_argument("--to", type=int, required=True, metavar="N", help="tokens of the longer context")
    parser.add_argument("--out", type=expand, required=True, metavar="DIR2", help="the new run's folder")
    parser.add_argument("--method", choices=METHODS, default="longred", help="what is trained on (default: longred)")
    parser.add_argument("--steps", type=int, default=512, metavar="N", help="steps of training (default: 512)")
    parser.add_argument("--base", type=float, metavar="B", help="rotary base (default: the least clean one)")
    parser.add_argument("--tokens", type=int, default=65536, metavar="N", help="tokens of each measure")
    flags, others = parser.parse_known_args(arguments)
    with one_line_errors("deltaformer_jax.extend"):
        base = _check(flags, others)
    from deltaformer_jax.extension import as_config

    argument = as_config.argument(flags.workdir, flags.to, flags.method, flags.steps, base)
    out = epath.Path(flags.out)
    _train([f"--config={as_config.__file__}:{argument}", f"--workdir={flags.out}", *others])
    if "--dry_run" in others or processes.index() > 0 or not _finished(out):
        return
    if processes.count() > 1:
        say_aside("the same command in one process compares both models")
        return
    with one_line_errors("deltaformer_jax.extend"):
        print(json.dumps(report(flags, out)))


def _check(flags, others: list[str]) -> float | None:
    """The rotary base, which takes a while to find for long contexts; None: nothing is rotated.

    Raises ValueError or OSError, naming the flag, before anything is written.
    """
    from deltaformer_jax.config.remarks.rotary_bound import rotations
    from deltaformer_jax.extension.plan import extended

    for name in ("to", "steps", "tokens"):
        if getattr(flags, name) < 1:
            raise ValueError(f"--{name} {getattr(flags, name)}: give 1 or more")
    _check_others(flags, others)
    out = epath.Path(flags.out)
    begun = Saved.read(out).config.run.init_from if (out / Saved.FILE).exists() else flags.workdir
    if begun != flags.workdir:
        raise ValueError(
            f"--out {flags.out}: holds a run that began from {begun or 'nothing'}, not from {flags.workdir}; "
            "give another folder"
        )
    before = Saved.read(epath.Path(flags.workdir)).config
    with waiting("looking for the rotary base", say_aside):
        config = extended(before, flags.workdir, flags.to, flags.method, flags.steps, flags.base)
    return flags.base or next((one.base for one in rotations(config.model) if one.field == "rope_base"), None)


def _check_others(flags, others: list[str]) -> None:
    """Raise ValueError unless these are flags of train.py, which checks their values, and the config is not given."""
    rest = iter(others)
    for flag in rest:
        name, equals, _ = flag.removeprefix("--").partition("=")
        if not flag.startswith("--"):
            raise ValueError(f"{flag!r}: not a flag")
        if name in ("config", "resume"):
            raise ValueError(
                f"{flag}: the config is made from the run in {flags.workdir}; set fields of it, "
                "--config.section.field=value"
            )
        of_config = name.removeprefix("no").startswith("config.")
        if not of_config and name not in OWN:
            raise ValueError(f"{flag}: no such flag{did_you_mean(name, [*vars(flags), *OWN])}")
        if not equals and (OWN.get(name) or name.startswith("config.")):
            next(rest, None)


def _train(arguments: list[str]) -> None:
    from deltaformer_jax import train

    kept, sys.argv = sys.argv, [sys.argv[0], *arguments]
    try:
        train.main()
    finally:
        sys.argv = kept


def _finished(out: epath.Path) -> bool:
    from deltaformer_jax.training.workdir import standing

    config = Saved.read(out).config
    return standing(str(out), config, resume=True).finished


def report(flags, out: epath.Path) -> dict[str, Any]:
    """What is printed, also written to DIR2."""
    from deltaformer_jax.evaluate.corpus import evaluation_corpus
    from deltaformer_jax.extension.picture import picture
    from deltaformer_jax.extension.report import compared
    from deltaformer_jax.training.checkpoints.restore import restore

    with waiting("restoring both models", say_aside):
        before, after = restore(flags.workdir, note=say_aside), restore(flags.out, note=say_aside)
    corpus = evaluation_corpus(after, None, Path())
    found = compared(before, after, corpus, tokens=flags.tokens, advance=lambda text: say_aside(f"measuring: {text}"))
    found["method"] = after.config.objective.name
    (out / FILE).write_text(json.dumps(found, indent=1) + "\n")
    with (out / FILE).with_suffix(".png").open("wb") as file:
        picture(found, flags.out).savefig(file, format="png", dpi=120)
    print(table(found), file=sys.stderr)
    return found


def table(found: dict[str, Any]) -> str:
    from deltaformer_jax.extension.report import beyond

    short, long = found["short_length"], found["long_length"]
    lines = [("", "before", "after")]
    both = lambda name, of: lines.append((name, *(f"{of(found[when]):.4f}" for when in ("before", "after"))))
    both(f"nats, texts of {short}", lambda one: one["short"]["loss"])
    both(f"nats, texts of {long}", lambda one: one["long"]["loss"])
    both(f"nats, positions above {short}", lambda one: beyond(one["long"]["by_position"], short))
    for i, point in enumerate(found["after"]["recall"]):
        both(f"nats saved at distance {point['distance']}", lambda one, i=i: one["recall"][i]["saved"])
    least = min(found["drift"]["similarity"])
    return right_aligned(lines) + f"\nleast similarity of a layer's stream: {least:.4f}"


if __name__ == "__main__":
    main()
