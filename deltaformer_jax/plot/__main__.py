"""Plot the curves of one or several runs in one picture:

    python -m deltaformer_jax.plot DIR... [--out FILE.png] [--x step|tokens] [--smooth N] [--names NAME,NAME]

Training loss and accuracy (every logged step as a thin line, the mean of every N of them as a thick one), evaluation in
bits per byte or, of a synthetic task, accuracy, norm of the gradient, learning rate and tokens per second, from
DIR/metrics.jsonl; a run may still be going on. A mean stands at the middle of its N steps: the thick line begins N/2
logged steps after the first and ends as many before the last. Without --out: curves.png in the first DIR. DIRs may be
gs:// paths. Bad input: one line, exit code 2.

    python -m deltaformer_jax.plot DIR... --time

draws where the time of the runs went, from DIR/time.jsonl: steps, waiting for data, evaluation, checkpoints, compiling,
start-up, and work lost to restarts. Without --out: time.png in the first DIR.
"""

import io

from etils import epath

from deltaformer_jax.config.argument_parser import ArgumentParser
from deltaformer_jax.config.errors import one_line_errors
from deltaformer_jax.host.paths import expand


def main(arguments: list[str] | None = None) -> None:
    parser = ArgumentParser(
        prog="python -m deltaformer_jax.plot", description="Plot the curves of one or several runs in one picture."
    )
    parser.add_argument("workdirs", type=expand, nargs="+", metavar="DIR", help="the runs' folders; may be gs://")
    parser.add_argument(
        "--out", type=expand, metavar="FILE", help="a .png, .pdf or .svg file (default: DIR/curves.png)"
    )
    parser.add_argument(
        "--x", choices=("step", "tokens"), default="step", help="quantity on the horizontal axis (default: step)"
    )
    parser.add_argument(
        "--smooth",
        type=int,
        default=10,
        metavar="N",
        help="average training loss and accuracy over N logged steps; 1: no smoothing (default: 10)",
    )
    parser.add_argument(
        "--names", metavar="NAME,NAME", help="names of the runs in the legend (default: the folders' names)"
    )
    parser.add_argument("--time", action="store_true", help="draw where the time went, in place of the curves")
    flags = parser.parse_args(arguments)

    with one_line_errors("deltaformer_jax.plot"):
        from deltaformer_jax.plot import picture, time_spent
        from deltaformer_jax.plot.curves import names, read_curves
        from deltaformer_jax.training.watch.ledger import read_ledger

        if flags.smooth < 1:
            raise ValueError(f"--smooth {flags.smooth}: give 1 (no smoothing) or more")
        labels = names(flags.workdirs, flags.names)
        if flags.time:
            drawn = time_spent.figure(time_spent.spent_by(labels, [*map(read_ledger, flags.workdirs)], flags.workdirs))
        else:
            runs = [read_curves(workdir)._replace(name=name) for workdir, name in zip(flags.workdirs, labels)]
            drawn = picture.figure(runs, flags.x, flags.smooth)
        name = "time.png" if flags.time else "curves.png"
        out = epath.Path(flags.out) if flags.out else epath.Path(flags.workdirs[0]) / name
        if out.suffix not in (".png", ".pdf", ".svg"):
            raise ValueError(f"--out {out}: end it in .png, .pdf or .svg")
        written = io.BytesIO()
        drawn.savefig(written, format=out.suffix[1:], dpi=150)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(written.getvalue())
        print(out)


if __name__ == "__main__":
    main()
