"""The section `optimizer`: the update and the schedule of its rate."""

import dataclasses

from deltaformer_jax.config.fields import setting


@dataclasses.dataclass
class OptimizerConfig:
    """The update and its learning-rate schedule. Steps of the schedule count updates, not skipped steps."""

    name: str = setting(
        "adamw",
        'The update: "adamw"; "muon" (the matrices of the layers by Muon, all else by AdamW); "lion"; "adafactor". '
        "Their rates differ: docs/optimizers.md.",
        choices=("adamw", "muon", "lion", "adafactor"),
    )
    learning_rate: float = setting(
        1e-3,
        "Peak learning rate, reached at the end of the warm-up. For adafactor relative to the size of an array: its "
        "root mean square, at least 0.001.",
        least=0,
        finite=True,
    )
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
    b1: float = setting(
        0.9,
        "Decay of the running mean of gradients, per update, of adamw and of muon's AdamW. For lion the weight of its "
        "running mean in the sign that it takes.",
        least=0,
        below=1,
    )
    b2: float = setting(
        0.95,
        "Decay of the running mean of squared gradients, per update, of adamw and of muon's AdamW. For lion the decay "
        "of its running mean of gradients.",
        least=0,
        below=1,
    )
    epsilon: float = setting(
        1e-8,
        "What adamw and muon's AdamW add to the root of the mean squared gradient.",
        least=0,
        finite=True,
    )
    muon_momentum: float = setting(
        0.95, "Muon's decay of the running mean of a matrix's gradients, per update.", least=0, below=1
    )
    muon_per_head: bool = setting(
        False,
        "Whether Muon takes the kernel of each head as a matrix of its own, in queries, keys, values, output gates and "
        "the output of a mixer. If not, all heads are one matrix. docs/optimizers.md.",
    )
    weight_decay: float = setting(
        0.1,
        "Weight decay, multiplied by the learning rate; lion's usual rate is smaller and its decay larger. Norm gains, "
        "biases and numbers per head are exempt.",
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
    skip: str = setting(
        "deviations",
        "Which steps are skipped, beside those whose loss or gradient norm is not finite: those whose gradient norm is "
        'above the mean by many standard deviations ("deviations"), or above the mean of the last 100 updates by a '
        'factor ("ratio", Baichuan-M1\'s rule).',
        choices=("deviations", "ratio"),
    )
    skip_deviations: float = setting(
        20.0,
        'For skip "deviations": after the first 20 updates, steps are skipped whose gradient norm is more than this '
        "many standard deviations above the mean of about the last 50 updates. 0: only steps that are not finite are "
        "skipped.",
        least=0,
    )
    skip_ratio: float = setting(
        1.2,
        'For skip "ratio": after the first 100 updates, steps are skipped whose gradient norm is above this factor '
        "times the mean of the last 100 updates, plus skip_floor.",
        above=0,
        finite=True,
    )
    skip_floor: float = setting(0.1, 'For skip "ratio": see skip_ratio.', least=0, finite=True)
    skip_in_a_row: int = setting(
        1, 'For skip "ratio": after so many skipped steps in a row the next finite one is made.', least=1
    )
    rollback_after: int = setting(
        3,
        "After this many skipped steps in a row, the run goes back to its last checkpoint and leaves out "
        "their batches.",
        least=1,
    )
    lora_rank: int = setting(
        0,
        "LoRA: train only a change of this rank beside each kernel W of lora_kernels, x W + (x A) B * lora_alpha / "
        "lora_rank. A is drawn and B is 0, so that the first step sees the model of run.init_from. 0: train all "
        "parameters. docs/fine_tuning.md.",
        least=0,
    )
    lora_alpha: float = setting(16.0, "LoRA: the change is multiplied by lora_alpha / lora_rank.", above=0, finite=True)
    lora_kernels: tuple = setting(
        ("mixer.*", "mlp.*"),
        "LoRA: patterns of the names of kernels in a block, with * for anything: mixer.inputs.query, mlp.down. Only "
        "matrices are adapted, never embeddings, norms, biases, convolutions or gates with one number per head.",
    )

    def __post_init__(self):
        self.lora_kernels = tuple(self.lora_kernels) if isinstance(self.lora_kernels, list) else self.lora_kernels


# The fields that only some of the updates read, and which. All other fields are read by each.
READ_BY = {
    "b1": ("adamw", "muon", "lion"),
    "b2": ("adamw", "muon", "lion"),
    "epsilon": ("adamw", "muon"),
    "muon_momentum": ("muon",),
    "muon_per_head": ("muon",),
}
