"""The settings of a run: plain dataclasses, one per section, checked before any work is done.

A config file is Python with a `get_config()` that returns a `Config`; a flag such as
`--config.model.d_model=256` overrides one field.
"""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True, init=False)
class Mixer:
    """One entry of `model.mixers` that differs from the model's own settings.

    `Mixer("softmax_attention", window=128, num_heads=8)` is softmax attention with those fields of
    `ModelConfig` replaced in that layer. A bare name stands for a mixer without overrides.
    """

    name: str
    overrides: tuple[tuple[str, Any], ...]

    def __init__(self, name: str, **overrides: Any):
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "overrides", tuple(sorted(overrides.items())))


@dataclasses.dataclass
class ModelConfig:
    """Sizes and choices of the language model. Widths are numbers of features, windows numbers of tokens."""

    vocab_size: int = 0  # 0: taken from the data's tokenizer
    d_model: int = 256
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 4
    head_dim: int = 64
    mlp_dim: int = 0  # 0: 8/3 d_model, rounded up to a multiple of 64
    # A repeating pattern of mixer names or Mixer(name, **overrides); num_layers is a multiple of its length.
    mixers: tuple = ("delta_former",)
    tie_embeddings: bool = True
    norm_epsilon: float = 1e-6
    compute_dtype: str = "float32"  # parameters are always float32
    remat: str = "none"  # "none", or "block": recompute each block in the backward pass
    conv_size: int = -1  # tokens of the short convolutions, 0: none; -1: the mixer's own (retention, linear: none)
    output_gate: str = "auto"  # "on", "off"; "auto": the mixer's own (linear_attention: none)
    # Attention mixers.
    rope_base: float = 10_000.0  # 0: no rotary embedding
    qk_norm: bool = False
    kv_shift: bool = False
    window: int = 0  # softmax attention only; 0: no window
    forget_gate: bool = False  # softmax attention only: scores fade as the tokens between say
    sinks: bool = False  # softmax attention only: a trained score of value 0 in each head
    chunk_size: int = 0  # 0: chosen by the op
    implementation: str = ""  # "": chosen by the op
    # DeltaFormer.
    write_query: str = "key"  # "key", "query" or "projected"
    write_similarity: str = "softmax"  # "linear", "relu", "exp", "softmax", "round"
    read_similarity: str = "softmax"
    write_scale: float = 0.0  # 0: head_dim ** -0.5, or 1 where the write's keys are normalised
    read_scale: float = 0.0  # 0: head_dim ** -0.5
    # "auto": L2-normalise the write's keys and queries for linear, relu, round and exp writes; "on", "off".
    write_key_norm: str = "auto"
    alpha: str = "off"  # "off", or "sigmoid": of a projection with bias
    beta: str = "sigmoid"  # "sigmoid" or "raw": of a projection with bias; "one": 1 everywhere
    # Mixers with a memory of fixed size: num_heads heads of queries and keys.
    num_value_heads: int = 0  # of the delta nets, a multiple of num_heads; 0: num_heads
    value_dim: int = 0  # 0: head_dim
    negative_eigenvalues: bool = False  # the delta nets' β in (0, 2) instead of (0, 1)


def on_any_device(model: ModelConfig) -> ModelConfig:
    """The same model, the choice of implementations left to the ops: its weights fit, its values differ by rounding.

    For programs that read a run which was trained elsewhere, and for decoding: kernels do not go on from a cache.
    """

    def free(mixer):
        if not isinstance(mixer, Mixer):
            return mixer
        return Mixer(mixer.name, **{field: value for field, value in mixer.overrides if field != "implementation"})

    return dataclasses.replace(model, implementation="", mixers=tuple(map(free, model.mixers)))


@dataclasses.dataclass
class DataConfig:
    """Where the text is and how it is cut. `batch_size` counts sequences over all devices and all hosts."""

    # A folder made by deltaformer_jax.data.prepare (also gs://, copied here once), or several, mixed by their share of
    # the rows: "FOLDER=WEIGHT,FOLDER=WEIGHT"; "": the running Python's standard library. Or a synthetic task:
    # "task:NAME,option=value,option=value", whose rows are examples of sequence_length tokens (deltaformer_jax.tasks).
    path: str = ""
    tokenizer: str = "bytes"  # used when path is "": "bytes", a tokenizer.json file, or "bpe:SIZE"
    sequence_length: int = 256
    batch_size: int = 16


@dataclasses.dataclass
class OptimizerConfig:
    """AdamW. Steps count optimiser updates; `decay_steps` is the schedule's whole length, warm-up included."""

    learning_rate: float = 1e-3
    warmup_steps: int = 50
    decay_steps: int = 1000
    schedule: str = "cosine"  # "cosine", "wsd" (warm-up, stable, decay) or "constant"
    wsd_decay_fraction: float = 0.2  # the share of decay_steps that "wsd" spends going down
    final_learning_rate: float = 0.1  # as a fraction of learning_rate
    b1: float = 0.9
    b2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0  # 0: no clipping
    accumulation_steps: int = 1  # a batch is cut into this many equal parts, weighted by their tokens
    # A step whose gradient is not finite, or whose norm is so many standard deviations above the mean of those before
    # it, is skipped (0: only what is not finite is). After so many skipped in a row, the run goes back to its last
    # checkpoint and passes over their batches.
    skip_deviations: float = 20.0
    rollback_after: int = 3


@dataclasses.dataclass
class MeshConfig:
    """How many devices each axis has; their product is the number of devices. -1 on `data`: all that are left."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    context: int = 1


@dataclasses.dataclass
class RunConfig:
    """What a run does and when. Intervals are in steps; 0 switches the thing off."""

    steps: int = 1000
    seed: int = 0
    log_every: int = 10
    eval_every: int = 250
    eval_batches: int = 0  # batches of the evaluation split; 0: all of it
    checkpoint_every: int = 250
    keep_checkpoints: int = 3
    sample_prompt: str = "def "  # written on from at the end of the run; "": no sample
    sample_tokens: int = 200
    tensorboard: bool = False  # curves in DIR/tensorboard too; needs the extra "tensorboard"
    statistics_every: int = 0  # norms of every layer's parameters, gradients and activations, in DIR/statistics.jsonl
    profile_steps: int = 0  # how many steps jax.profiler traces, after the first two made, into DIR/profile
    compilation_cache: str = ""  # a folder to keep compiled programs in; "": as JAX_COMPILATION_CACHE_DIR says


@dataclasses.dataclass
class Config:
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    run: RunConfig = dataclasses.field(default_factory=RunConfig)
