"""Checks and times the Triton kernels on an NVIDIA GPU.

    uv run --extra cuda --group kernels python benchmarks/gpu.py --json gpu.json

is designed to end within 8 minutes, and with --quick within 4. It has not yet been run on a GPU in this form. When its
time is over, it stops the cases that still run and names those that it did not start. Its parts, in their order:

shapes    values and all gradients at random shapes of up to 400 tokens, in float32 and bfloat16, against the definition
          (`recurrent` in float64 on the CPU)
long      8192 and 32768 tokens beside "chunked" on the device: values and all gradients in bfloat16, every block of 64
          tokens by itself, every form, packed rows too
repeats   one call a thousand times, and one of 8192 tokens 250 times. Results without additions in arbitrary order must
          be the same bit for bit, the others within rounding. This would show a race between thread blocks
times     whole calls, bfloat16: delta_attention at batch 2, 32 heads, 8192 tokens, head dimension 128, and at two
          shapes of heads of 64; the gated ops at batch 4, 32 heads, 8192 tokens, head dimension 128
kernels   (with --kernels) single kernels of delta_attention at the shape of the times
tiles     (with --tiles) single kernels with other tiles than the table's, and how far their results lie apart
train     (with --models) a training step of the 340M and 1.3B configs: ms by part, tokens a second, MFU
decode    (with --models) a decoding step of the 340M configs beside a plain read of weights and caches

A case (a few shapes, a form, a kernel) is a process of its own. Several processes import, draw and compile at the same
time. On the device one process at a time checks or measures, by a lock. Compiling itself uses the device for moments,
without the lock, when XLA tries algorithms of its own; the times are medians over rounds, so that such moments matter
little. A case that crashes, does not fit into memory, or takes too long is one line of the output, and the others go
on.

--quick                     12 shapes; 8192 tokens only, with three forms of each op; 100 repeats; 5 rounds of times
--only PART
--op delta|gated            delta_attention, or gated_delta_rule and gated_linear_attention
--kernels                   also the part "kernels"
--tiles                     also the part "tiles"
--models                    also the parts "train" and "decode"
--seconds N                 when to stop; 480, and 240 with --quick
--tile KERNEL=SIZES         another tile of delta_attention in all parts, for example write_forward=128,64,8,3,2,32:
                            rows, columns, warps, stages, halves, group (pallas_kernels/triton/delta/table.py). It
                            replaces the tiles for softmax in bfloat16 and head dimensions up to 128. May be repeated
--plan PLAN                 which launches compute the gated ops, in all parts: "walk" in the place of the table's
                            "stages" (pallas_kernels/triton/gated/table.py)
--shapes N, --repeats N     how many random shapes of each op, and how many times a call is repeated
--length T                  tokens of the times and of the single kernels
--processes N               how many cases compile at the same time; the default is the number of cores, at most 12
--json FILE                 everything, written anew after every result

Columns of the tables at the end:

ms, cuDNN ms      medians over 11 rounds, in each of which a program runs up to 5 times in a row
× cuDNN           the median ratio to cuDNN's flash attention of the same batch, heads and length, unpacked, in the same
                  process and round. For a single kernel: to cuDNN's forward or backward pass
aim ms            the time to reach on an H100
TFLOP/s           one causal pass of two products is 2 T² K B H floating-point operations. Flash attention and the tied
                  form take one pass forward and 3.5 forward and backward, the untied form twice that, and w = k with r
                  query heads per key head 1 + 1/r times that. A single kernel: 1 forward, 2.5 backward
temporaries GB    device memory that the program takes beside its arguments and results
chunked / ours    the median ratio of the portable form's time to the kernels'
× fla             the ratio of the kernels' median to that of flash-linear-attention's kernel, if it is installed
plan … ms         the gated kernels by the plan that their table does not choose (pallas_kernels/triton/gated/table.py)
jax-linear-attention ms    that package's kernel, or why there is no time of it

The last line names all disagreements. The exit code is 1 if there is one in a check, or if a case failed or hung; 2 for
a wrong argument or a machine without a GPU; else 0.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import signal
import sys
import time
from pathlib import Path

import cases

from deltaformer_jax.host.paths import write_whole
from pallas_kernels.triton.gated.table import PLANS

PARTS = ("shapes", "long", "repeats", "times", "kernels", "tiles", "train", "decode")
OPS = ("delta", "gated")
WHOLE = ("train", "decode")  # parts of whole models, which belong to no op
SECONDS, QUICK_SECONDS = 480, 240
# A process takes no memory before it needs it, and then what it needs.
ENVIRONMENT = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92"}
# What a table of times leaves out of a row.
LEFT_OUT = ("part", "op", "status", "said", "seconds", "at s", "parts", "slowest")


class Parser(argparse.ArgumentParser):
    """An error is one line."""

    def error(self, message):
        self.exit(2, f"benchmarks/gpu.py: error: {message}\n")


def positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def tile(text: str) -> tuple[str, list[int]]:
    """ "write_forward=128,64,8,3,2,16" -> (kernel, the fields of a Tile)."""
    from pallas_kernels.triton.delta.table import TABLE, Tile

    kernel, _, sizes = text.partition("=")
    kernels = sorted({kernel for kernel, _ in TABLE[90]})
    fields = [int(x) if x.isdecimal() else 0 for x in sizes.split(",")]
    if kernel not in kernels or not 4 <= len(fields) <= 6:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not KERNEL=ROWS,COLUMNS,WARPS,STAGES[,HALVES[,GROUP]] with a kernel of {', '.join(kernels)}"
        )
    given = Tile(*fields)
    # Backward write kernels read arrays that are padded to a multiple of 64 rows.
    most_rows = 64 if kernel in ("write_backward", "tied_backward") else 256
    allowed = {
        "rows": [2**n for n in range(4, 9) if 2**n <= most_rows],
        "columns": [2**n for n in range(4, 9)],
        "warps": [1, 2, 4, 8, 16],
        "stages": range(1, 9),
        "halves": [1, 2],
        "group": range(0, 1025),
    }
    for name, values in allowed.items():
        if getattr(given, name) not in values:
            among = ", ".join(map(str, values)) if isinstance(values, list) else f"{values[0]} to {values[-1]}"
            raise argparse.ArgumentTypeError(f"{text!r}: {name} must be one of {among}")
    return kernel, fields


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", choices=PARTS)
    parser.add_argument("--op", choices=OPS)
    parser.add_argument("--kernels", action="store_true")
    parser.add_argument("--tiles", action="store_true")
    parser.add_argument("--models", action="store_true")
    parser.add_argument("--seconds", type=positive)
    parser.add_argument("--tile", type=tile, action="append", default=[])
    parser.add_argument("--plan", choices=PLANS)
    parser.add_argument("--shapes", type=positive)
    parser.add_argument("--repeats", type=positive)
    parser.add_argument("--length", type=positive, default=8192)
    parser.add_argument("--processes", type=positive, default=min(len(os.sched_getaffinity(0)), 12))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    options.shapes = options.shapes or (12 if options.quick else 50)
    options.repeats = options.repeats or (100 if options.quick else 1000)
    options.seconds = options.seconds or (QUICK_SECONDS if options.quick else SECONDS)
    if options.op == "gated" and options.only in ("kernels", "tiles"):
        parser.error(f"--only {options.only} times kernels of delta_attention: leave out --op gated")
    if options.op and options.only in WHOLE:
        parser.error(f"--only {options.only} times whole models: leave out --op {options.op}")
    if options.json and not options.json.resolve().parent.is_dir():
        parser.error(f"--json {options.json}: the folder does not exist")
    return options


def plan(options: argparse.Namespace) -> list[cases.Case]:
    """The cases in the order in which they are started."""
    from on_gpu import kernels, long, models, repeats, shapes, tiles, times

    chosen, rounds = dict(options.tile), 5 if options.quick else 11
    if options.plan:
        chosen["plan"] = options.plan
    makers = {
        "shapes": lambda op: shapes.cases(op, options.shapes, chosen),
        "long": lambda op: long.cases(op, options.quick, chosen),
        "repeats": lambda op: repeats.cases(op, options.repeats, chosen),
        "times": lambda op: times.cases(op, options.length, rounds, chosen),
        "kernels": lambda op: kernels.cases(options.length, rounds, chosen) if op == "delta" else [],
        "tiles": lambda op: tiles.cases() if op == "delta" else [],
    }
    whole = {"train": models.train_cases, "decode": models.decode_cases}
    asked = {"kernels": options.kernels, "tiles": options.tiles, "train": options.models, "decode": options.models}
    parts = [options.only] if options.only else [part for part in PARTS if asked.get(part, True)]
    ops = [options.op] if options.op else OPS
    of_ops = [case for part in parts if part not in WHOLE for op in ops for case in makers[part](op)]
    return of_ops + [case for part in parts if part in WHOLE for case in whole[part](options.quick)]


class Log:
    """The results so far: each is printed and written when it comes."""

    def __init__(self, options: argparse.Namespace, machine: dict, start: float):
        self.rows, self._path, self._start = [], options.json, start
        kept = {name: str(x) if isinstance(x, Path) else x for name, x in vars(options).items()}
        self._head = {"title": "Triton kernels on an NVIDIA GPU", "machine": machine, "options": kept}

    def add(self, case: cases.Case, row: dict) -> None:
        row = {"part": case.part, "op": case.op, "case": case.name, **row}
        row["at s"] = round(time.monotonic() - self._start, 1)
        note = ""
        if row["part"] in ("times", "kernels") and any(x["op"] == row["op"] for x in self.wrong):
            note = row["note"] = "results of this op are wrong, see the checks"
        self.rows.append(row)
        wrong = "WRONG: " if row["status"] == "wrong" else ""
        line = f"{row['at s']:5.0f} s  {case.part:8}{case.op:6} {case.name}: {wrong}{row['said']}"
        print(line + (f" ({note})" if note else ""), flush=True)
        if self._path:
            text = json.dumps({**self._head, "rows": self.rows}, indent=1, ensure_ascii=False)
            write_whole(self._path, f"{text}\n".encode())

    @property
    def wrong(self) -> list[dict]:
        return [row for row in self.rows if row["status"] == "wrong"]

    @property
    def without(self) -> list[dict]:
        """The cases that ended, or were not started, without their results."""
        return [row for row in self.rows if row["status"] not in ("done", "wrong")]

    @property
    def failed(self) -> bool:
        """Whether a result is wrong, or a case ended by a fault rather than by a lack of memory or time."""
        return any(row["status"] in ("wrong", cases.FAILED, cases.HUNG) for row in self.rows)

    def tables(self) -> None:
        from measure import report

        if checks := self._checks():
            report("Checks", checks, None)
        timed = {
            "times, delta": "delta_attention, whole calls",
            "times, gated": "The gated ops, whole calls",
            "kernels, delta": "delta_attention, single kernels",
            "tiles, delta": "delta_attention, other tiles",
            "train, ": "training steps",
            "decode, ": "decoding steps",
        }
        for name, title in timed.items():
            part, op = name.split(", ")
            merged = {}  # fla's time of a form and direction is a result of its own
            for row in self.rows:
                if (row["part"], row["op"], row["status"]) == (part, op, "done"):
                    numbers = {key: x for key, x in row.items() if key not in LEFT_OUT}
                    merged.setdefault((row["case"], row.get("direction"), row.get("tile")), {}).update(numbers)
            # A row without its own time: fla refused the call.
            if rows := [row for row in merged.values() if "ms" in row]:
                report(title, rows, None)

    def _checks(self) -> list[dict]:
        """A row for each part and op: how many results agree, and the largest difference in them."""
        table = collections.defaultdict(lambda: {"agree": 0, "wrong": 0, "without a result": 0, "largest": 0.0})
        for row in self.rows:
            if row["part"] not in ("shapes", "long", "repeats"):
                continue
            entry = table[row["part"], row["op"]]
            entry[{"done": "agree", "wrong": "wrong"}.get(row["status"], "without a result")] += 1
            apart = [*row.get("errors", row.get("differences", {})).values(), row.get("apart", 0.0)]
            entry["largest"] = max([entry["largest"], *apart], key=lambda x: (x != x, x))  # NaN is the largest
        return [{"part": part, "op": op, **entry} for (part, op), entry in table.items()]


def describe_machine(worker) -> None:
    """The case that looks whether this machine can run the others."""
    from importlib.metadata import version

    from measure import machine

    from pallas_kernels.triton import packages

    found = machine()
    if found["platform"] == "gpu" and (reason := packages.missing()):
        sys.exit(reason)
    versions = {name: version(name) for name in ("triton", "jax-triton")} if found["platform"] == "gpu" else {}
    worker.result("", **found, **versions)


def the_machine() -> dict:
    """Its device and versions. Ends this program if there is no NVIDIA GPU, or a package is missing."""
    rows = []
    case = cases.Case("machine", "", "", "gpu:describe_machine", {})
    cases.run([case], lambda case, row: rows.append(row), processes=1, seconds=60, environment=ENVIRONMENT)
    (row,) = rows
    if row["status"] != "done":
        Parser().error(f"no NVIDIA GPU can be used: {row['said']}")
    if row["platform"] != "gpu":
        Parser().error(f"no NVIDIA GPU found: this program needs one, and JAX finds {row['device']}")
    return {name: x for name, x in row.items() if name not in LEFT_OUT}


def main() -> None:
    start = time.monotonic()
    options = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the cases end too
    log = Log(options, machine := the_machine(), start)
    work = plan(options)
    print(f"{machine}: {len(work)} cases, {options.processes} processes, at most {options.seconds} s", flush=True)
    left = options.seconds - (time.monotonic() - start)
    cases.run(work, log.add, processes=options.processes, seconds=left, environment=ENVIRONMENT)
    log.tables()
    names = lambda rows: "; ".join(f"{row['part']} {row['op']} {row['case']}: {row['said']}" for row in rows) or "none"
    print(f"without a result: {names(log.without)}")
    print(f"disagreements: {names(log.wrong)}")
    sys.exit(1 if log.failed else 0)


if __name__ == "__main__":
    main()
