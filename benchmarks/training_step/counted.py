"""The training step compiled for an H100 with no GPU at hand, and counted. Nothing runs.

Where no GPU is, XLA cannot time its choices of tiles and libraries for products, so the program may differ from the one
that a GPU runs. The arithmetic of Triton's kernels is not visible in it: it is taken from the model's closed form.
"""

from __future__ import annotations

import re

import jax
from measure import report

from deltaformer_jax.compiled.launches import Launch, Loop, launches
from deltaformer_jax.config import Config
from deltaformer_jax.sharding.device_memory import planned_memory
from deltaformer_jax.training.ahead_of_time.chips import CHIPS
from deltaformer_jax.training.ahead_of_time.flops import model_flops
from deltaformer_jax.training.ahead_of_time.topologies import find_topology, without_cache
from training_step.compiled import SMALLER, Step, compile_step
from training_step.parts import kernel_passes, part_of, roofline, short

H100 = CHIPS["h100"]
LISTED = 15  # launches


def prepare(config: Config) -> Step:
    """Compile the step. Raises ValueError if it needs more memory than the card has."""
    card = find_topology("h100")
    with planned_memory(card.device_memory), without_cache():
        step = compile_step(config, card.devices[0])
    if step.memory > H100.memory:
        needs = f"the step takes {step.memory / 1e9:.1f} GB, and the card has {H100.memory / 1e9:.1f}"
        raise ValueError(f"{step.title}: {needs}; {SMALLER}")
    return step


def show(step: Step, json: str | None):
    """Print the loops, the launches that move most, and the parts. If `json` is given, write them there too."""
    found, loops = launches(step.compiled.as_text())
    peak = H100.flops
    flops = model_flops(step.program.parts, step.config.data.sequence_length)
    asked, ops = flops.model, flops.ops
    rows = roofline(found, ops * step.tokens * kernel_passes(found), H100.bandwidth, peak)
    seconds = sum(row.seconds for row in rows)
    table = [
        {
            "part": row.part,
            "launches": row.launches,
            "GB": row.bytes / 1e9,
            "TFLOP": row.flops / 1e12,
            "roofline ms": 1e3 * row.seconds,
            "share": row.seconds / seconds,
        }
        for row in rows
    ]
    table.append({"part": "all"} | {name: sum(row[name] for row in table) for name in table[0] if name != "part"})
    bound = {
        "compiled for": step.device.device_kind,
        "memory GB": step.memory / 1e9,
        "TFLOP of the model": 3 * asked * step.tokens / 1e12,
        "tokens/s at most": step.tokens / seconds,
        "MFU at most": 3 * asked * step.tokens / seconds / peak,
    }
    report("loops, each without those inside it", of_loops(found, loops), None)
    report("the launches that move most", of_launches(found), None)
    title = f"{step.title}: counted from the program compiled for an H100, not measured"
    report(title, table, json, **bound, loops=of_loops(found, loops), most=of_launches(found))
    print(f"jax {jax.__version__}; {step.memory / 1e9:.1f} GB of the card's {H100.memory / 1e9:.1f}")
    print(f"the model asks for {bound['TFLOP of the model']:.1f} TFLOP a step, {3 * asked / 1e9:.3g} GFLOP a token")
    print(f"at most {bound['tokens/s at most']:,.0f} tokens a second, MFU {bound['MFU at most']:.1%}: an upper bound")


def of_loops(found: list[Launch], loops: list[Loop]) -> list[dict]:
    """A row for each loop. "?" after the turns: the program does not say how many; counted as 1."""
    rows = []
    for loop in loops:
        inside = [x for x in found if x.loop == loop.name]
        rows.append(
            {
                "loop": loop.name,
                "turns": f"{loop.turns}{'' if loop.known else '?'}",
                "launches a turn": len(inside),
                "GB a turn": sum(x.bytes for x in inside) / 1e9,
                "from": short(loop.op_name),
            }
        )
    return rows


def of_launches(found: list[Launch]) -> list[dict]:
    most = sorted(found, key=lambda x: -x.turns * x.bytes)[:LISTED]
    return [
        {
            "launch": x.name,
            "part": part_of(x),
            "turns": x.turns,
            "GB": x.turns * x.bytes / 1e9,
            "output": re.sub(r"\{[\d,]*\}", "", x.shape)[:24],
            "from": short(x.op_name)[-56:],
        }
        for x in most
    ]
