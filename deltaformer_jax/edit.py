"""A run's model, changed, as the folder of a new run:

    python -m deltaformer_jax.edit --workdir DIR --out DIR2 NAME [OPTION=VALUE ...] [--step N]

NAME               OPTION=VALUE
remove_layers      layers=5,6                         without these layers, counted from 0 at the embedding
rescale_rope       base=1e5 scaling=yarn:4,2048       another rotary embedding: one of the two, or both
merge_adapters                                        LoRA's adapters added to their kernels

DIR2 has one checkpoint, of step 0, with a new optimiser: `sample` and `evaluate` read it, and `train --workdir DIR2`
goes on training it. `prune` chooses layers by measuring them. Wrong input gives one line on stderr and exit code 2.
"""

from __future__ import annotations

import sys
from typing import Any

from etils import epath

from deltaformer_jax.config.argument_parser import ArgumentParser
from deltaformer_jax.config.errors import one_line_errors
from deltaformer_jax.config.saved import Saved
from deltaformer_jax.host.arguments import whole_numbers
from deltaformer_jax.host.paths import expand
from deltaformer_jax.host.spelling import did_you_mean
from deltaformer_jax.host.waiting import say_aside, waiting

# Name -> {option: how its text is read}.
EDITS = {
    "remove_layers": {"layers": whole_numbers},
    "rescale_rope": {"base": float, "scaling": str},
    "merge_adapters": {},
}
HELP = {
    "layers": "give the numbers of layers, counted from 0 at the embedding, such as layers=5,6",
    "base": "give a number above 1, such as base=1e5",
    "scaling": "give one as of model.rope_scaling, such as scaling=yarn:4,2048",
}


def main(arguments: list[str] | None = None) -> None:
    parser = ArgumentParser(
        prog="python -m deltaformer_jax.edit", description="A run's model, changed, as the folder of a new run."
    )
    parser.add_argument("--workdir", type=expand, required=True, metavar="DIR", help="the run's folder")
    parser.add_argument("--out", type=expand, required=True, metavar="DIR2", help="the new run's folder")
    parser.add_argument("--step", type=int, metavar="N", help="step of the checkpoint to use (default: the newest)")
    parser.add_argument("name", metavar="NAME", help=f"what to do: {', '.join(EDITS)}")
    parser.add_argument("options", nargs="*", metavar="OPTION=VALUE", help="its options, such as layers=5,6")
    flags = parser.parse_args(arguments)
    with one_line_errors("deltaformer_jax.edit"):
        options = read_options(flags.name, flags.options)
        saved = Saved.read(epath.Path(flags.workdir))  # a wrong folder is said before jax is imported
        edit(flags, saved, options)


def read_options(name: str, given: list[str]) -> dict[str, Any]:
    """The options of an edit, from OPTION=VALUE. Raises ValueError that names what is wrong."""
    if name not in EDITS:
        raise ValueError(f"{name!r} is not an edit: give one of {', '.join(EDITS)}{did_you_mean(name, EDITS)}")
    found, known = {}, EDITS[name]
    for text in given:
        option, equals, value = text.partition("=")
        if not equals or option not in known:
            allowed = ", ".join(f"{option}=VALUE" for option in known) or "it takes no option"
            raise ValueError(f"{name} {text}: is not an option of it: {allowed}{did_you_mean(option, known)}")
        if option in found:
            raise ValueError(f"{name} {text}: {option} is given twice")
        try:
            found[option] = known[option](value)
        except ValueError:
            raise ValueError(f"{name} {text}: {HELP[option]}") from None
        if found[option] in ([], ""):
            raise ValueError(f"{name} {text}: {HELP[option]}")
    if known and not found:
        raise ValueError(f"{name}: give {' or '.join(f'{option}=VALUE' for option in known)}")
    return found


def edit(flags, saved: Saved, options: dict[str, Any]) -> None:
    with waiting("importing jax", say_aside):
        from deltaformer_jax.model import num_parameters
        from deltaformer_jax.surgery import remove_layers, rescale_rope
        from deltaformer_jax.surgery.new_run import model_of, write_changed
        from deltaformer_jax.training.checkpoints.new_run import check_new
        from deltaformer_jax.training.checkpoints.restore import restore

    if flags.name == "merge_adapters" and not saved.config.optimizer.lora_rank:
        raise ValueError(f"merge_adapters: the run in {flags.workdir} has no adapters (optimizer.lora_rank = 0)")
    check_new("--out", epath.Path(flags.out))
    with waiting(f"restoring the model of {flags.workdir}", say_aside):
        run = restore(flags.workdir, flags.step, say_aside)
    model, params = model_of(saved, run), run.params
    if flags.name == "remove_layers":
        model, params = remove_layers(model, params, options["layers"])
    elif flags.name == "rescale_rope":
        model, params = rescale_rope(model, params, **options)
    with waiting(f"writing {flags.out}", say_aside):
        write_changed(flags.out, flags.workdir, saved, run, model, params)
    done = " ".join([flags.name, *flags.options])
    print(f"{flags.out}: {done}; {model.num_layers} layers, {num_parameters(params):,} parameters", file=sys.stderr)


if __name__ == "__main__":
    main()
