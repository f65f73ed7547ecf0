"""The section `run`: what a run does and when."""

import dataclasses

from deltaformer_jax.config.fields import setting


@dataclasses.dataclass
class RunConfig:
    """What a run does and when. Intervals are in steps; an interval of 0 switches its action off."""

    steps: int = setting(
        1000,
        "Number of steps in all, those before a resume included. A step takes one batch; skipped steps count too.",
        least=1,
    )
    seed: int = setting(
        0,
        "Seed of the initial parameters, of the order of the data or the examples of a task, and of the "
        "sample at the end.",
        least=0,
        below=2**32,
    )
    init_from: str = setting(
        "",
        "Folder whose weights a new run starts from: of another run, or with config.json and safetensors "
        "(docs/weights.md). Without --config the model is that folder's. The optimiser and the schedule begin anew. "
        '"": new parameters.',
    )
    log_every: int = setting(
        10,
        "Steps between records of loss, speed, gradient norm and learning rate in DIR/metrics.jsonl; the first "
        "step is recorded too. 0: none.",
        least=0,
    )
    eval_every: int = setting(
        250, "Steps between evaluations; the last step is evaluated too. 0: no evaluation at all.", least=0
    )
    eval_batches: int = setting(0, "Batches of the evaluation split per evaluation. 0: all of it.", least=0)
    checkpoint_every: int = setting(
        250,
        "Steps between checkpoints; the last state, or the one at an interruption, is saved too. 0: only that.",
        least=0,
    )
    keep_checkpoints: int = setting(3, "Number of the newest checkpoints that are kept.", least=1)
    sample_prompt: str = setting(
        "def ", 'Prompt of the text that the model continues at the end of the run. "": no sample.'
    )
    sample_tokens: int = setting(200, "Length of that sample in tokens. 0: no sample.", least=0)
    tensorboard: bool = setting(
        False, 'Whether the curves are also written for TensorBoard, to DIR/tensorboard. Needs the extra "tensorboard".'
    )
    wandb: bool = setting(
        False,
        "Whether the curves are also sent to Weights & Biases; with WANDB_MODE=offline they stay in DIR/wandb. Needs "
        'the extra "wandb".',
    )
    trackio: bool = setting(
        False,
        'Whether the curves are also written to Trackio\'s database on this machine. Needs the extra "trackio".',
    )
    project: str = setting("deltaformer_jax", "The project that holds the run in Weights & Biases and in Trackio.")
    statistics_every: int = setting(
        0,
        "Steps between records of the norms of every layer's parameters, gradients and activations, which are "
        "written to DIR/statistics.jsonl; the first step is recorded too. 0: none.",
        least=0,
    )
    profile_steps: int = setting(
        0,
        "Number of steps that jax.profiler traces, into DIR/profile. It begins after the process's first two. 0: none.",
        least=0,
    )
    compilation_cache: str = setting(
        "",
        'Folder, also gs://, that keeps compiled programs for later processes. "": what '
        "JAX_COMPILATION_CACHE_DIR says.",
    )
