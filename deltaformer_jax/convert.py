"""Weights of the Hugging Face hub's format as the folder of a run, and back:

    python -m deltaformer_jax.convert FOLDER --workdir DIR [--tokenizer FILE] [--compute_dtype bfloat16]
    python -m deltaformer_jax.convert --to-hf --workdir DIR --out FOLDER [--model_type TYPE] [--dtype bfloat16]

The first writes a run with one checkpoint, of step 0, which `sample` and `evaluate` read. The chat template in
FOLDER, or else beside --tokenizer FILE, becomes the form of the run's conversations, chat.json, in which
`sample --chat` asks. The second writes the newest checkpoint of a run, or --step N, as config.json, safetensors,
tokenizer.json, its chat template and a model card: what the model began from, its data, its settings, and its scores,
those of `evaluate --tasks --out DIR/tasks` too. Wrong input gives one line on stderr and exit code 2.
"""

from __future__ import annotations

import json

from etils import epath

from deltaformer_jax.config.argument_parser import ArgumentParser
from deltaformer_jax.config.errors import one_line_errors
from deltaformer_jax.config.saved import Saved
from deltaformer_jax.host.paths import expand
from deltaformer_jax.host.waiting import say, say_aside, waiting


def main(arguments: list[str] | None = None) -> None:
    parser = ArgumentParser(
        prog="python -m deltaformer_jax.convert", description="Weights of the Hugging Face hub's format, in and out."
    )
    parser.add_argument("folder", type=expand, nargs="?", metavar="FOLDER", help="config.json and safetensors to read")
    parser.add_argument("--workdir", type=expand, required=True, metavar="DIR", help="the run's folder")
    parser.add_argument("--tokenizer", type=expand, metavar="FILE", help="tokenizer.json (default: that in FOLDER)")
    parser.add_argument(
        "--compute_dtype",
        choices=("float32", "bfloat16"),
        help="of activations and products (default: float32)",
    )
    parser.add_argument("--to-hf", action="store_true", help="write the run in --workdir to --out")
    parser.add_argument("--out", type=expand, metavar="FOLDER", help="where --to-hf writes")
    parser.add_argument("--step", type=int, metavar="N", help="step of the checkpoint to write (default: the newest)")
    parser.add_argument(
        "--model_type", metavar="TYPE", help="of the folder (default: the first that can say the model)"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the tensors that --to-hf writes (default: those of the folder that was read, else float32)",
    )
    flags = parser.parse_args(arguments)
    with one_line_errors("deltaformer_jax.convert"):
        for name in ("tokenizer", "compute_dtype") if flags.to_hf else ("step", "model_type", "dtype"):
            if getattr(flags, name) is not None:
                why = "is for reading a FOLDER, not for --to-hf" if flags.to_hf else "is for --to-hf"
                raise ValueError(f"--{name}: {why}; leave it out")
        if flags.to_hf:
            if flags.out is None or flags.folder is not None:
                raise ValueError("--to-hf: give --workdir DIR and --out FOLDER, and no other folder")
            write(flags)
        elif flags.folder is None or flags.out is not None:
            raise ValueError("give the FOLDER to read and --workdir DIR; or --to-hf, --workdir DIR and --out FOLDER")
        else:
            read(flags)


def read(flags) -> None:
    """FOLDER -> a run in --workdir."""
    with waiting("importing jax", say_aside):
        from pathlib import Path

        from deltaformer_jax.config import Config, DataConfig, RunConfig
        from deltaformer_jax.data import load_tokenizer
        from deltaformer_jax.data.chat import CHAT_FILE, pretrained_format
        from deltaformer_jax.interop import load_pretrained
        from deltaformer_jax.interop.files import check_folder
        from deltaformer_jax.interop.kept import KEPT_FILE, to_keep
        from deltaformer_jax.interop.load import read_config
        from deltaformer_jax.model import num_parameters
        from deltaformer_jax.model_parts import params_of
        from deltaformer_jax.training.checkpoints.new_run import check_new, write_run
        from deltaformer_jax.training.checkpoints.restore import TOKENIZER_FILE
        from deltaformer_jax.training.checkpoints.vocabulary import with_vocabulary

    workdir = epath.Path(flags.workdir)
    check_new("--workdir", workdir)
    check_folder(Path(flags.folder))
    file = Path(flags.tokenizer or Path(flags.folder) / TOKENIZER_FILE)
    if not file.exists():
        raise FileNotFoundError(f"{file}: no such file; give a tokenizer.json with --tokenizer FILE")
    tokenizer = load_tokenizer(file)
    form = pretrained_format(Path(flags.folder), file, tokenizer)
    size = read_config(Path(flags.folder))[1].vocab_size
    if size < tokenizer.vocab_size:
        raise ValueError(
            f"{file}: has {tokenizer.vocab_size} tokens, the model in {flags.folder} has {size}; give the "
            "tokenizer.json that the model was trained with, --tokenizer FILE"
        )
    with waiting(f"reading {flags.folder}", say_aside):
        model, model_config = load_pretrained(flags.folder, compute_dtype=flags.compute_dtype or "float32")
    kept = to_keep(Path(flags.folder), tokenizer, file)
    data = DataConfig(tokenizer=str(workdir / TOKENIZER_FILE))
    config = with_vocabulary(Config(model=model_config, data=data, run=RunConfig(sample_prompt="")), tokenizer)
    files = {KEPT_FILE: json.dumps(kept) + "\n"}
    if form is not None:
        files[CHAT_FILE] = json.dumps(form.settings()) + "\n"
    with waiting(f"writing {workdir}", say_aside):
        write_run(workdir, Saved(config, tokenizer.hash, ""), params_of(model), tokenizer, files)
    mixers = ", ".join(dict.fromkeys(m if isinstance(m, str) else m.name for m in config.model.mixers))
    say(f"{num_parameters(model):,} parameters ({mixers}) in {workdir}")


def write(flags) -> None:
    """The run in --workdir -> --out."""
    Saved.read(epath.Path(flags.workdir))  # a wrong folder is said before jax is imported
    with waiting("importing jax", say_aside):
        from pathlib import Path

        from deltaformer_jax.interop import save_pretrained
        from deltaformer_jax.interop.kept import dtypes_of_run, kept_of_run, tokenizer_config_of_run
        from deltaformer_jax.interop.save import choose
        from deltaformer_jax.model_parts import merge
        from deltaformer_jax.training.checkpoints.model_card import model_card
        from deltaformer_jax.training.checkpoints.new_run import check_new
        from deltaformer_jax.training.checkpoints.restore import TOKENIZER_FILE, read_chat, restore

    check_new("--out", epath.Path(flags.out))
    with waiting(f"restoring the model of {flags.workdir}", say_aside):
        run = restore(flags.workdir, flags.step, say_aside)
    kept = kept_of_run(flags.workdir, run.config.data.sequence_length)
    *_, why = choose(run.config.model, flags.model_type, kept.get("model_type"))
    with waiting(f"writing {flags.out}", say_aside):
        kind = save_pretrained(
            merge(run.program.parts, run.params),
            run.config.model,
            flags.out,
            model_type=flags.model_type,
            dtype=flags.dtype or dtypes_of_run(flags.workdir),
            tokenizer=Path(flags.workdir) / TOKENIZER_FILE,
            chat=read_chat(flags.workdir),
            tokenizer_config=tokenizer_config_of_run(flags.workdir, run.tokenizer),
            card=model_card(run, flags.workdir),
            kept=kept,
        )
    if why:
        say(f"a {kind}, which no other program opens: {why}")
    say(f"{flags.out}: a {kind}, from step {run.step}")


if __name__ == "__main__":
    main()
