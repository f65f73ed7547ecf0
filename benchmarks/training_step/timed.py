"""The training step run and profiled on a GPU, on random tokens.

A step's time is the median over steps that are waited for one by one. The times of the parts are sums over the events
of a profile of some further steps; "idle" is what the parts leave of a step: launches that wait, and the host.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from typing import NamedTuple

import jax
from measure import report

from deltaformer_jax.config import Config
from deltaformer_jax.training.state import TrainState
from deltaformer_jax.training.watch.peak import utilisation
from training_step.compiled import SMALLER, Step, compile_step, random_batch
from training_step.hlo_bytes import launches
from training_step.parts import measured, model_flops
from training_step.profile import device_events

STEPS, PROFILED = 20, 3


class Running(NamedTuple):
    step: Step
    state: TrainState
    batch: dict[str, jax.Array]


def prepare(config: Config) -> Running:
    """Compile the step and run it twice. Raises ValueError if there is no GPU or too little memory."""
    device = jax.devices()[0]
    if device.platform != "gpu":
        raise ValueError(f"jax runs on {device.platform} here; --device h100 counts the step without a GPU")
    try:
        step = compile_step(config, device)
        running = Running(step, step.program.create_state(0), random_batch(step))
        return run(run(running))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise ValueError(f"the step does not fit into the memory of the {device.device_kind}; {SMALLER}") from None


def run(running: Running) -> Running:
    state, _ = jax.block_until_ready(running.step.compiled(running.state, running.batch))
    return running._replace(state=state)


def show(running: Running, json: str | None):
    """Print the parts' times. If `json` is given, write them there too."""
    times = []
    for _ in range(STEPS):
        start = time.perf_counter()
        running = run(running)
        times.append(time.perf_counter() - start)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(PROFILED):
                running = run(running)
        events = list(device_events(folder))

    step, seconds = running.step, statistics.median(times)
    parts = measured(events, launches(step.compiled.as_text())[0])
    parts = {name: total / PROFILED for name, total in parts.items()}
    parts["idle"] = seconds - sum(parts.values())
    parts["all"] = seconds
    table = [{"part": name, "ms": 1e3 * x, "share": x / seconds} for name, x in parts.items()]
    asked, _ = model_flops(step.program.parts, step.config.data.sequence_length)
    rate = step.tokens / seconds
    mfu = utilisation(rate, 3 * asked, [step.device])
    report(f"{step.title}, {step.device.device_kind}", table, json, **{"tokens/s": rate, "MFU": mfu})
    print(f"{rate:,.0f} tokens a second, MFU {'not known' if mfu is None else f'{mfu:.1%}'}")
