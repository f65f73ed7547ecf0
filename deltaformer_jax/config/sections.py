"""The settings of a run: dataclasses, one per section, whose fields say what values they may have (fields.py).

A config file is Python with a `get_config()` that returns a `Config`; a flag such as
`--config.model.d_model=256` overrides one field.
"""

import dataclasses

from deltaformer_jax.config.fields import rule_of, setting
from deltaformer_jax.config.imports import is_import
from deltaformer_jax.config.mixer import Mixer


def _implementations() -> tuple[str, ...]:
    from deltaformer_jax.ops.common.dispatch import IMPLEMENTATIONS

    return IMPLEMENTATIONS


@dataclasses.dataclass
class ModelConfig:
    """Sizes and choices of the language model. Widths are numbers of features, windows numbers of tokens.

    A mixer takes the fields that its constructor names. Where a field says `own`, that value (or None) leaves the
    choice to the mixer, or to the op that it calls.
    """

    vocab_size: int = setting(0, least=0)  # 0: taken from the data's tokenizer
    d_model: int = setting(256, least=1)
    num_layers: int = setting(4, least=1)
    num_heads: int = setting(4, least=1)
    num_kv_heads: int = setting(4, least=1)
    head_dim: int = setting(64, least=1)
    mlp_dim: int = setting(0, least=0)  # 0: 8/3 d_model, rounded up to a multiple of 64
    # A repeating pattern whose entries are a mixer's name, Mixer(name or class, **overrides) or "package.module:Class";
    # num_layers is a multiple of its length.
    mixers: tuple = ("delta_former",)
    tie_embeddings: bool = True
    norm_epsilon: float = setting(1e-6, above=0, finite=True)
    compute_dtype: str = setting("float32", choices=("float32", "bfloat16"))  # parameters are always float32
    remat: str = setting("none", choices=("none", "block"))  # "block": recompute each block in the backward pass
    conv_size: int = setting(-1, least=0, own=-1, none=0)  # tokens of the short convolutions; 0: none
    output_gate: str = setting("auto", choices=("on", "off"), own="auto", none="off", is_true="on")
    # Attention mixers.
    rope_base: float = setting(10_000.0, none=0.0, zero_is_none=True, finite=True)  # 0: no rotary embedding
    qk_norm: bool = setting(False, must_be_used=True)
    kv_shift: bool = setting(False, must_be_used=True)
    window: int = setting(0, least=1, own=0, must_be_used=True)  # of softmax attention; by default all tokens
    # Of softmax attention: each token lowers the scores of all tokens before it, by as much as it decides.
    forget_gate: bool = setting(False, must_be_used=True)
    # Of softmax attention: a trained score in each head, of the value 0, that a token may attend to.
    sinks: bool = setting(False, must_be_used=True)
    chunk_size: int = setting(0, least=1, own=0)
    implementation: str = setting("", choices=_implementations, own="")
    # DeltaFormer.
    write_query: str = setting("key", choices=("key", "query", "projected"), must_be_used=True)
    # "linear", "relu", "exp", "softmax", "round", or "package.module:NAME" of one of yours.
    write_similarity: str = setting("softmax", importable=True, must_be_used=True)
    read_similarity: str = setting("softmax", importable=True, must_be_used=True)
    # By default head_dim ** -0.5, and for the write 1 where its keys are normalised.
    write_scale: float = setting(0.0, own=0.0, must_be_used=True, finite=True)
    read_scale: float = setting(0.0, own=0.0, must_be_used=True, finite=True)
    # "auto": L2-normalise the write's keys and queries for linear, relu, round and exp writes; "on", "off".
    write_key_norm: str = setting("auto", choices=("auto", "on", "off"), must_be_used=True)
    # "sigmoid": of a projection with bias.
    alpha: str = setting("off", choices=("off", "sigmoid"), must_be_used=True)
    # "sigmoid" or "raw": of a projection with bias; "one": 1 everywhere
    beta: str = setting("sigmoid", choices=("sigmoid", "raw", "one"), must_be_used=True)
    # Mixers with a memory of fixed size: num_heads heads of queries and keys.
    num_value_heads: int = setting(0, least=1, own=0, must_be_used=True)  # of the delta nets; by default num_heads
    value_dim: int = setting(0, least=1, own=0)  # by default head_dim
    # The delta nets' β in (0, 2) instead of (0, 1).
    negative_eigenvalues: bool = setting(False, must_be_used=True)

    def __post_init__(self):
        self.mixers = tuple(self.mixers) if isinstance(self.mixers, list) else self.mixers
        for field in dataclasses.fields(self):
            # As it stands in config.json.
            setattr(self, field.name, rule_of(field).said(getattr(self, field.name)))


def on_any_device(model: ModelConfig) -> ModelConfig:
    """The same model, the choice of implementations left to the ops: its weights fit, its values differ by rounding.

    For programs that read a run which was trained elsewhere, and for decoding: kernels do not go on from a cache.
    """

    def free(mixer):
        if not isinstance(mixer, Mixer) or is_import(mixer.name):  # what a class of yours is given is its own affair
            return mixer
        others = {field: value for field, value in mixer.overrides if field != "implementation"}
        return Mixer(mixer.name, **others)

    return dataclasses.replace(model, implementation="", mixers=tuple(map(free, model.mixers)))


@dataclasses.dataclass
class DataConfig:
    """Where the text is and how it is cut. `batch_size` counts sequences over all devices and all hosts."""

    # A folder made by deltaformer_jax.data.prepare (also gs://, copied here once), or several, mixed by their share of
    # the rows: "FOLDER=WEIGHT,FOLDER=WEIGHT"; "": the running Python's standard library. Or a synthetic task:
    # "task:NAME,option=value,option=value", whose rows are examples of sequence_length tokens (deltaformer_jax.tasks).
    path: str = ""
    tokenizer: str = "bytes"  # used when path is "": "bytes", a tokenizer.json file, or "bpe:SIZE"
    # For a corpus without evaluation documents, one long text say: the share of each document, at its end, that is kept
    # from training for evaluation.
    eval_tail: float = setting(0.0, least=0, below=1)
    sequence_length: int = setting(256, least=1)
    batch_size: int = setting(16, least=1)


@dataclasses.dataclass
class OptimizerConfig:
    """AdamW. Steps count optimiser updates; `decay_steps` is the schedule's whole length, warm-up included."""

    learning_rate: float = setting(1e-3, least=0, finite=True)
    warmup_steps: int = setting(50, least=0)
    decay_steps: int = setting(1000, least=1)
    # "wsd": warm-up, stable, decay.
    schedule: str = setting("cosine", choices=("cosine", "wsd", "constant"))
    wsd_decay_fraction: float = setting(0.2, least=0, most=1)  # the share of decay_steps that "wsd" spends going down
    final_learning_rate: float = setting(0.1, least=0, most=1)  # as a fraction of learning_rate
    b1: float = setting(0.9, least=0, below=1)
    b2: float = setting(0.95, least=0, below=1)
    epsilon: float = setting(1e-8, least=0, finite=True)
    weight_decay: float = setting(0.1, least=0, finite=True)
    clip_norm: float = setting(1.0, least=0)  # 0: no clipping
    accumulation_steps: int = setting(1, least=1)  # a batch is cut into this many equal parts, weighted by their tokens
    # A step whose gradient is not finite, or whose norm is so many standard deviations above the mean of those before
    # it, is skipped (0: only what is not finite is). After so many skipped in a row, the run goes back to its last
    # checkpoint and passes over their batches.
    skip_deviations: float = setting(20.0, least=0)
    rollback_after: int = setting(3, least=1)


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

    steps: int = setting(1000, least=1)
    seed: int = setting(0, least=0, below=2**32)
    log_every: int = setting(10, least=0)
    eval_every: int = setting(250, least=0)
    eval_batches: int = setting(0, least=0)  # batches of the evaluation split; 0: all of it
    checkpoint_every: int = setting(250, least=0)
    keep_checkpoints: int = setting(3, least=1)
    sample_prompt: str = "def "  # written on from at the end of the run; "": no sample
    sample_tokens: int = setting(200, least=0)
    tensorboard: bool = False  # curves in DIR/tensorboard too; needs the extra "tensorboard"
    # Norms of every layer's parameters, gradients and activations, in DIR/statistics.jsonl.
    statistics_every: int = setting(0, least=0)
    # How many steps jax.profiler traces, after the first two made, into DIR/profile.
    profile_steps: int = setting(0, least=0)
    compilation_cache: str = ""  # a folder to keep compiled programs in; "": as JAX_COMPILATION_CACHE_DIR says


@dataclasses.dataclass
class Config:
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    run: RunConfig = dataclasses.field(default_factory=RunConfig)
