"""The section `optimizer`: the update and the schedule of its rate."""

import dataclasses

from deltaformer_jax.config.fields import setting


@dataclasses.dataclass
class OptimizerConfig:
    """AdamW and its learning-rate schedule. Steps of the schedule count updates, not skipped steps."""

    learning_rate: float = setting(1e-3, "Peak learning rate, reached at the end of the warm-up.", least=0, finite=True)
    warmup_steps: int = setting(50, "Updates over which the rate rises linearly to its peak. 0: no warm-up.", least=0)
    decay_steps: int = setting(
        1000, "Length of the whole schedule in updates, warm-up included. Later updates use the final rate.", least=1
    )
    schedule: str = setting(
        "cosine",
        'After the warm-up: "cosine" decays along a half cosine; "wsd" (warm-up, stable, decay) stays at the '
        'peak, then decays linearly; "constant" stays at the peak for ever.',
        choices=("cosine", "wsd", "constant"),
    )
    wsd_decay_fraction: float = setting(
        0.2, 'Schedule "wsd": the fraction of decay_steps, at its end, over which the rate decays.', least=0, most=1
    )
    final_learning_rate: float = setting(
        0.1,
        'The rate at the end of the schedule, as a fraction of learning_rate. Not used by "constant".',
        least=0,
        most=1,
    )
    b1: float = setting(0.9, "Adam's decay of the running mean of gradients, per update.", least=0, below=1)
    b2: float = setting(0.95, "Adam's decay of the running mean of squared gradients, per update.", least=0, below=1)
    epsilon: float = setting(
        1e-8, "Adam's epsilon, added to the root of the mean squared gradient.", least=0, finite=True
    )
    weight_decay: float = setting(
        0.1,
        "AdamW's weight decay, multiplied by the learning rate. Norm gains, biases and numbers per head are exempt.",
        least=0,
        finite=True,
    )
    clip_norm: float = setting(
        1.0, "Largest global norm of the gradient; a longer gradient is scaled down to it. 0: no clipping.", least=0
    )
    accumulation_steps: int = setting(
        1,
        "Number of equal parts that a batch is cut into. Their gradients are computed one after the other and "
        "added, weighted by their numbers of tokens: the same update with less memory.",
        least=1,
    )
    skip_deviations: float = setting(
        20.0,
        "Steps with unusual gradients are skipped: those whose loss or gradient norm is not finite, and, "
        "after the first 20 updates, those whose gradient norm is more than this many standard deviations "
        "above the mean of about the last 50 updates. 0: only steps that are not finite are skipped.",
        least=0,
    )
    rollback_after: int = setting(
        3,
        "After this many skipped steps in a row, the run goes back to its last checkpoint and leaves out "
        "their batches.",
        least=1,
    )
