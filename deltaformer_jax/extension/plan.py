"""The config of a run that extends another one's context."""

from __future__ import annotations

import dataclasses

from deltaformer_jax.config import Config, ModelConfig, ObjectiveConfig, OptimizerConfig
from deltaformer_jax.config.mixer import entry, with_rotary
from deltaformer_jax.config.remarks.rotary_bound import ATTENTION, least_base, rotations

# Of the learning rate at the height of the run before. LongReD's code takes 2e-5 for models that were trained at 3e-4.
RATE = 0.1
SHORT_LENGTH = 1024  # tokens; LongReD's


def extended(before: Config, workdir: str, to: int, method: str, steps: int, base: float | None = None) -> Config:
    """The config that goes on from the run `before` in `workdir` with rows of `to` tokens.

    The rotary base is `base`, or the least of two digits, no smaller than before, with which likeness raises a key's
    score at every distance up to `to` (arXiv 2405.14591), for each of the model's widths and scalings. A step has about
    as many tokens as before. The learning rate is RATE of that before, constant, without a warm-up.

    Raises ValueError, naming the flag, for a context that is not longer, a base below 1, one where nothing is rotated,
    and a task.
    """
    was = before.data.sequence_length
    if to <= was:
        raise ValueError(f"--to {to}: the run in {workdir} has a context of {was} tokens; give a longer one")
    if before.data.path.startswith("task:"):
        raise ValueError(f"--workdir {workdir}: was trained on {before.data.path}; only runs on text are extended")
    if base is not None and not base > 1:
        raise ValueError(f"--base {base:g}: must be greater than 1")
    model, accumulation, usual = before.model, before.optimizer.accumulation_steps, OptimizerConfig()
    if new_base := base or clean_base(model, to):
        model = with_rotary(model, {"rope_base": new_base})
    rows = accumulation * max(1, round(before.data.batch_size * was / (to * accumulation)))
    return dataclasses.replace(
        before,
        model=model,
        data=dataclasses.replace(before.data, sequence_length=to, batch_size=rows),
        objective=_objective(before, workdir, to, method),
        optimizer=dataclasses.replace(
            before.optimizer,
            learning_rate=RATE * before.optimizer.learning_rate,
            schedule="constant",
            warmup_steps=0,
            # What a constant rate does not read is as if it had not been set.
            decay_steps=usual.decay_steps,
            final_learning_rate=usual.final_learning_rate,
            wsd_decay_fraction=usual.wsd_decay_fraction,
            lora_rank=0,
        ),
        run=dataclasses.replace(
            before.run,
            init_from=workdir,
            steps=steps,
            eval_every=max(1, steps // 4),
            checkpoint_every=max(1, steps // 4),
        ),
    )


def clean_base(model: ModelConfig, to: int) -> float | None:
    """The least base of two digits for contexts of `to` tokens, no smaller than those that the layers have; None if no
    layer rotates its queries and keys. A layer with a window scores no more distances than that,
    unless it sees first tokens or separators behind it.

    Raises ValueError, naming the flags, if no base has that.
    """
    asked = [one for one in rotations(model) if one.field == "rope_base"]
    if not asked:
        return None
    base, before = max(10.0, *(one.base for one in asked)), None
    while base != before:  # clean bases are no interval: one that is clean for the next width may not be for this one
        before = base
        for one in asked:
            base = least_base(min(to, one.window or to), base, one.width, one.scaling)
            if base is None:
                raise ValueError(
                    f"--to {to}: with {one.width} rotated features no rotary base raises the score of a like key at "
                    "every distance; give one as --base"
                )
    return base


def _objective(before: Config, workdir: str, to: int, method: str) -> ObjectiveConfig:
    """LongReD's weights: for contexts 16 times as long or longer those of its extension by 16, else those by 4."""
    was, layers = before.data.sequence_length, before.model.num_layers
    short = min(SHORT_LENGTH, was)
    if method == "plain":
        return ObjectiveConfig()
    if method == "mixed":
        return ObjectiveConfig("mixed", short_length=short)
    far = to >= 16 * was
    count = min(3 if far else 6, layers - 1)
    attends = any(mixer.name in ATTENTION for mixer in map(entry, before.model.mixers))
    rule = f"{'kl' if attends else 'uniform'}:{count}" if count else "last"
    return ObjectiveConfig(
        "longred",
        teacher_workdir=workdir,
        short_length=short,
        layers=rule,
        alpha_short=2.0 if far else 5.0,
        alpha_s2l=15.0 if far else 10.0,
        skip="uniform" if far else "cream",
    )
