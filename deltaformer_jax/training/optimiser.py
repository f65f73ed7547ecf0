"""AdamW with global-norm clipping, a learning-rate schedule and a weight-decay mask, all from optax."""

import optax

from deltaformer_jax.config import OptimizerConfig


def learning_rate_schedule(config: OptimizerConfig) -> optax.Schedule:
    """The learning rate of update n = 0, 1, ...; peak = learning_rate, floor = final_learning_rate * peak.

    Warm-up: peak (n + 1) / warmup_steps for n < warmup_steps, so that the first update does not have a rate of 0.
    After the warm-up, until n = decay_steps:
      cosine    floor + (peak - floor) (1 + cos(pi (n - warmup_steps) / (decay_steps - warmup_steps))) / 2
      wsd       peak, then linear to the floor over the last wsd_decay_fraction of decay_steps
    From n = decay_steps on the rate is the floor. With schedule "constant" it is the peak throughout.
    """
    peak, warmup, length = config.learning_rate, config.warmup_steps, config.decay_steps
    floor = peak * config.final_learning_rate
    if config.schedule == "cosine":
        after, boundaries = [optax.cosine_decay_schedule(peak, length - warmup, config.final_learning_rate)], []
    elif config.schedule == "wsd":
        down = min(round(length * config.wsd_decay_fraction), length - warmup)
        after = [optax.constant_schedule(peak), optax.linear_schedule(peak, floor, max(down, 1))]
        boundaries = [length - down]
    else:
        after, boundaries = [optax.constant_schedule(peak)], []
    if warmup == 0:
        return optax.join_schedules(after, boundaries)
    ramp = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
    return optax.join_schedules([ramp, *after], [warmup, *boundaries])


def make_optimiser(config: OptimizerConfig, decay_mask) -> optax.GradientTransformation:
    """Clip the global norm to `clip_norm` (0: no clipping), then AdamW.

    Weight decay applies to the parameters that are True in `decay_mask`.
    """
    adamw = optax.adamw(
        learning_rate_schedule(config),
        b1=config.b1,
        b2=config.b2,
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        mask=decay_mask,
    )
    if config.clip_norm == 0:
        return adamw
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)
