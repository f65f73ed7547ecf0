"""Parts "train" and "decode": whole models. A training step of a packaged config on random tokens, and a decoding step.

Each case compiles while others do, and runs alone.
"""

from __future__ import annotations

import time

from cases import Case

STEPS, PROFILED = 6, 2
# Config, rows of a batch, model.remat, model.unroll_layers. The batches fit into 80 GB.
TRAIN = (
    ("deltaformer_340m", 64, "kernels", False),
    ("deltaformer_340m", 32, "products", True),
    ("deltaformer_340m", 16, "operands", True),
    ("transformer_340m", 64, "kernels", False),
    ("deltaformer_1b3", 8, "kernels", False),
    ("deltaformer_340m", 64, "block", False),
)
QUICK_TRAIN = 3  # the first ones
# Config, rows, slots of the caches, dtype of the weights.
DECODE = (
    ("deltaformer_340m", 1, 2048, "bfloat16"),
    ("deltaformer_340m", 32, 2048, "bfloat16"),
    ("deltaformer_340m", 32, 2048, "float32"),
    ("transformer_340m", 32, 2048, "bfloat16"),
)


def train_cases(quick: bool) -> list[Case]:
    function = "on_gpu.models:time_training"
    return [
        Case("train", "", f"{config}, batch {batch}, remat {remat}{', unrolled' * unroll}", function, settings)
        for config, batch, remat, unroll in TRAIN[: QUICK_TRAIN if quick else None]
        if (settings := {"config": config, "batch": batch, "remat": remat, "unroll": unroll})
    ]


def decode_cases(quick: bool) -> list[Case]:
    return [
        Case(
            "decode", "", f"{config}, {batch} rows of {slots}, weights {weights}", "on_gpu.models:time_decoding", given
        )
        for config, batch, slots, weights in DECODE[: 2 if quick else None]
        if (given := {"config": config, "batch": batch, "slots": slots, "weights": weights})
    ]


def time_training(worker, config: str, batch: int, remat: str, unroll: bool, steps=STEPS, profiled=PROFILED) -> None:
    import jax
    from training_step import timed
    from training_step.compiled import compile_step

    from deltaformer_jax.config.command_line import parse
    from deltaformer_jax.config.files import config_folder

    timed.without_graphs()
    flags = [f"--config={config}", f"--config.data.batch_size={batch}", "--config.optimizer.accumulation_steps=1"]
    flags += [f"--config.model.remat={remat}", f"--config.model.unroll_layers={unroll}"]
    parsed = parse(["gpu.py", *flags], str(config_folder() / "tiny.py")).config
    begin = time.monotonic()
    step = compile_step(parsed, jax.devices()[0])
    compiled = time.monotonic() - begin
    with worker.alone():
        times = timed.take_times(timed.start(step), steps, profiled)
    parts = {row["part"]: row["ms"] for row in times.parts}
    said = ", ".join(f"{name} {ms:.0f}" for name, ms in parts.items() if name != "all" and ms >= 0.5)
    numbers = {"ms": parts["all"], "tokens/s": times.rate, "MFU": times.mfu, "memory GB": step.memory / 1e9}
    worker.result(
        f"{parts['all']:.0f} ms a step, {timed.say(times)}; ms: {said}; {step.memory / 1e9:.1f} GB; "
        f"compiled in {compiled:.0f} s",
        **numbers,
        parts=times.parts,
        slowest=times.slowest,
    )


def time_decoding(worker, config: str, batch: int, slots: int, weights: str) -> None:
    import decode

    from deltaformer_jax.config.files import packaged_config
    from deltaformer_jax.training.dry_run import with_any_vocabulary

    case = decode.Case(with_any_vocabulary(packaged_config(config)).model, batch, slots, weights)
    with worker.alone():
        row = case.measure()
    said = f"{row['ms']:.2f} ms a step, {row['ratio']:.1f} times a plain read of {row['GB']:.2f} GB"
    worker.result(f"{said} ({row['read']:.2f} ms), {batch / row['ms'] * 1e3:,.0f} tokens a second", **row)
