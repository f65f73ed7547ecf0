"""The training step run and profiled on a GPU, on random tokens.

Without CUDA graphs: in a profile, the launches of a graph have no names of their own, and most of a step would belong
to no part. A step's time is the median over steps that are waited for one by one. The times of the parts are sums over
the events of a profile of some further steps; "idle" is what the parts leave of a step: launches that wait, and the
host.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from typing import NamedTuple

import jax
from measure import report

from deltaformer_jax.compiled.launches import launches
from deltaformer_jax.config import Config
from deltaformer_jax.training.ahead_of_time.flops import model_flops
from deltaformer_jax.training.state import TrainState
from deltaformer_jax.training.watch.peak import utilisation
from training_step.compiled import SMALLER, Step, compile_step, random_batch
from training_step.parts import measured, part_of, short
from training_step.profile import device_events

STEPS, PROFILED = 20, 3
LISTED = 20  # launches


class Running(NamedTuple):
    step: Step
    state: TrainState
    batch: dict[str, jax.Array]


class Times(NamedTuple):
    parts: list[dict]  # a row for each part, "idle" and "all": part, ms, share
    slowest: list[dict]  # a row for each of the launches that take most of a step
    rate: float  # tokens a second
    mfu: float | None  # None if the device's peak is not known


def without_graphs():
    """Switch CUDA graphs off. To be called before JAX's backend starts."""
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_enable_command_buffer="


def prepare(config: Config) -> Running:
    """Compile the step and run it twice. Raises ValueError if there is no GPU or too little memory."""
    without_graphs()
    device = jax.devices()[0]
    if device.platform != "gpu":
        raise ValueError(f"jax runs on {device.platform} here; --device h100 counts the step without a GPU")
    try:
        return start(compile_step(config, device))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise ValueError(f"the step does not fit into the memory of the {device.device_kind}; {SMALLER}") from None


def start(step: Step) -> Running:
    """The step with a state and a batch on the device, run twice."""
    return run(run(Running(step, step.program.create_state(0), random_batch(step))))


def run(running: Running) -> Running:
    state, _ = jax.block_until_ready(running.step.compiled(running.state, running.batch))
    return running._replace(state=state)


def take_times(running: Running, steps: int = STEPS, profiled: int = PROFILED) -> Times:
    times = []
    for _ in range(steps):
        begin = time.perf_counter()
        running = run(running)
        times.append(time.perf_counter() - begin)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(profiled):
                running = run(running)
        events = list(device_events(folder))

    step, seconds = running.step, statistics.median(times)
    found = launches(step.compiled.as_text())[0]
    parts = {name: total / profiled for name, total in measured(events, found).items()}
    parts["idle"] = seconds - sum(parts.values())
    parts["all"] = seconds
    table = [{"part": name, "ms": 1e3 * x, "share": x / seconds} for name, x in parts.items()]
    asked = model_flops(step.program.parts, step.config.data.sequence_length).model
    rate = step.tokens / seconds
    return Times(table, slowest(events, found, profiled), rate, utilisation(rate, 3 * asked, [step.device]))


def slowest(events, found, profiled: int) -> list[dict]:
    """The launches that take most time in a step, with the end of their op_name."""
    total, count = {}, {}
    for name, seconds in events:
        name = name.removeprefix("%")
        total[name] = total.get(name, 0.0) + seconds
        count[name] = count.get(name, 0) + 1
    known = {name: x for x in found for name in (x.name, x.name.replace(".", "_"))}
    rows = []
    for name in sorted(total, key=total.get, reverse=True)[:LISTED]:
        x = known.get(name)
        row = {"launch": name[:40], "part": part_of(x) if x else "", "turns": count[name] / profiled}
        row |= {"ms": 1e3 * total[name] / profiled, "GB": x.turns * x.bytes / 1e9 if x else None}
        rows.append(row | {"from": short(x.op_name)[-56:] if x else ""})
    return rows


def say(times: Times) -> str:
    """Tokens a second and MFU, as a phrase."""
    return f"{times.rate:,.0f} tokens a second, MFU {'not known' if times.mfu is None else f'{times.mfu:.1%}'}"


def show(running: Running, json: str | None):
    """Print the parts' times. If `json` is given, write them there too."""
    times, step = take_times(running), running.step
    report("the launches that take most time", times.slowest, None)
    numbers = {"tokens/s": times.rate, "MFU": times.mfu, "slowest": times.slowest}
    report(f"{step.title}, {step.device.device_kind}", times.parts, json, **numbers)
    print(say(times))
