"""The settings of a run: dataclasses, one per section, whose fields say what values they may have (fields.py).

A config file is Python with a `get_config()` that returns a `Config`; a flag such as
`--config.model.d_model=256` overrides one field.
"""

import dataclasses

from deltaformer_jax.config.fields import rule_of, setting
from deltaformer_jax.config.imports import is_import
from deltaformer_jax.config.mixer import Mixer

_SIMILARITIES = '"softmax", "linear", "relu", "exp", "round", or "package.module:NAME" of your own'


def _implementations() -> tuple[str, ...]:
    from deltaformer_jax.ops.common.dispatch import IMPLEMENTATIONS

    return IMPLEMENTATIONS


@dataclasses.dataclass
class ModelConfig:
    """Sizes and choices of the language model. Widths are numbers of features, windows numbers of tokens.

    A mixer takes the fields that its constructor names. A field with an `own` value leaves the choice to the mixer, or
    to the op that the mixer calls, when it has that value or None.
    """

    vocab_size: int = setting(0, "Number of tokens in the vocabulary. 0: the size of the data's tokenizer.", least=0)
    d_model: int = setting(256, "Width of the residual stream.", least=1)
    num_layers: int = setting(4, "Number of blocks: a multiple of the length of `mixers`.", least=1)
    num_heads: int = setting(4, "Number of query heads.", least=1)
    num_kv_heads: int = setting(4, "Number of key and value heads of the attention mixers; divides num_heads.", least=1)
    head_dim: int = setting(64, "Width of a head's queries and keys.", least=1)
    mlp_dim: int = setting(
        0, "Hidden width of the SwiGLU feed-forward layer. 0: 8/3 d_model, rounded up to a multiple of 64.", least=0
    )
    mixers: tuple = setting(
        ("delta_former",),
        "The pattern of mixers, repeated over the layers. An entry is a mixer's name, Mixer(name or class, "
        '**overrides), or "package.module:Class".',
    )
    tie_embeddings: bool = setting(True, "Use the embedding table for the output logits too.")
    norm_epsilon: float = setting(1e-6, "Added to the mean square in every RMSNorm.", above=0, finite=True)
    compute_dtype: str = setting(
        "float32", "Dtype of activations and products. Parameters are always float32.", choices=("float32", "bfloat16")
    )
    remat: str = setting(
        "none",
        'Which activations are recomputed in the backward pass. "block": all inside a block, so that only the '
        "residual stream is kept.",
        choices=("none", "block"),
    )
    conv_size: int = setting(
        -1,
        "Tokens that the short causal convolutions of queries, keys and values see. 0: no convolutions.",
        least=0,
        own=-1,
        none=0,
    )
    output_gate: str = setting(
        "auto",
        "Multiply the mixer's output by a gate made of its input.",
        choices=("on", "off"),
        own="auto",
        none="off",
        is_true="on",
    )
    # Attention mixers.
    rope_base: float = setting(
        10_000.0,
        "Base of the rotary position embedding (RoPE) of queries and keys. 0: no position embedding.",
        none=0.0,
        zero_is_none=True,
        finite=True,
    )
    qk_norm: bool = setting(False, "Apply RMSNorm to each head's queries and keys.", must_be_used=True)
    kv_shift: bool = setting(
        False,
        "Mix each token's key and value with the previous token's, by learnt weights (KV shifting).",
        must_be_used=True,
    )
    window: int = setting(
        0,
        "How many tokens, itself included, a token attends to. 0: all tokens before it.",
        least=1,
        own=0,
        must_be_used=True,
    )
    forget_gate: bool = setting(
        False,
        "Give every token a learnt decay that lowers the scores of all tokens before it (forgetting attention).",
        must_be_used=True,
    )
    sinks: bool = setting(
        False, "Give each head one learnt score, with value 0, that every token may attend to.", must_be_used=True
    )
    chunk_size: int = setting(0, "Tokens in a chunk of the op's chunked form. 0: the op's default.", least=1, own=0)
    implementation: str = setting(
        "",
        'Which implementation of the op to use. "": the fastest one for the platform.',
        choices=_implementations,
        own="",
    )
    # DeltaFormer.
    write_query: str = setting(
        "key",
        'What reads the memory in the write: the "key", the "query", or a "projected" query of its own.',
        choices=("key", "query", "projected"),
        must_be_used=True,
    )
    write_similarity: str = setting(
        "softmax", f"Similarity κ₁ of the write: {_SIMILARITIES}.", importable=True, must_be_used=True
    )
    read_similarity: str = setting(
        "softmax", f"Similarity κ₂ of the read: {_SIMILARITIES}.", importable=True, must_be_used=True
    )
    write_scale: float = setting(
        0.0,
        "Factor on the write's scores. 0: head_dim ** -0.5, or 1 where the write's keys are normalised.",
        own=0.0,
        must_be_used=True,
        finite=True,
    )
    read_scale: float = setting(
        0.0, "Factor on the read's scores. 0: head_dim ** -0.5.", own=0.0, must_be_used=True, finite=True
    )
    write_key_norm: str = setting(
        "auto",
        'L2-normalise the keys and queries of the write. "auto": unless write_similarity is softmax.',
        choices=("auto", "on", "off"),
        must_be_used=True,
    )
    alpha: str = setting(
        "off",
        'Factor α on the value in the write. "off": 1; "sigmoid": sigmoid of a projection with bias.',
        choices=("off", "sigmoid"),
        must_be_used=True,
    )
    beta: str = setting(
        "sigmoid",
        'Factor β on the correction in the write. "one": 1; "raw": a projection with bias; "sigmoid": its sigmoid.',
        choices=("sigmoid", "raw", "one"),
        must_be_used=True,
    )
    # Mixers with a state of fixed size: num_heads heads of queries and keys.
    num_value_heads: int = setting(
        0, "Number of value heads, a multiple of num_heads. 0: num_heads.", least=1, own=0, must_be_used=True
    )
    value_dim: int = setting(0, "Width of a head's values. 0: head_dim.", least=1, own=0)
    negative_eigenvalues: bool = setting(
        False, "Let β reach from 0 to 2 instead of 1, so that a step may reflect the state.", must_be_used=True
    )

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
    """Where the text is and how it is cut into rows."""

    path: str = setting(
        "",
        "A folder made by deltaformer_jax.data.prepare (also gs://, copied here once); several, mixed by their share "
        'of the rows: "FOLDER=WEIGHT,FOLDER=WEIGHT"; or a synthetic task: "task:NAME,option=value". "": the source '
        "code of the running Python's standard library.",
    )
    tokenizer: str = setting(
        "bytes", 'Used when path is "": "bytes", a tokenizer.json file, or "bpe:SIZE", which is learnt from the text.'
    )
    eval_tail: float = setting(
        0.0,
        "For a corpus without evaluation documents: the fraction at each document's end that is kept for evaluation.",
        least=0,
        below=1,
    )
    sequence_length: int = setting(256, "Tokens in a row.", least=1)
    batch_size: int = setting(16, "Rows in a step, over all devices and all hosts.", least=1)


@dataclasses.dataclass
class OptimizerConfig:
    """AdamW. Steps count optimiser updates."""

    learning_rate: float = setting(1e-3, "Peak of the learning rate's schedule.", least=0, finite=True)
    warmup_steps: int = setting(50, "Steps over which the learning rate rises to its peak.", least=0)
    decay_steps: int = setting(
        1000, "Steps of the whole schedule, warm-up included; independent of run.steps.", least=1
    )
    schedule: str = setting(
        "cosine",
        'After warm-up: "cosine" decay; "wsd", stable and then a linear decay; "constant".',
        choices=("cosine", "wsd", "constant"),
    )
    wsd_decay_fraction: float = setting(
        0.2, 'The fraction of decay_steps over which "wsd" decays, at its end.', least=0, most=1
    )
    final_learning_rate: float = setting(
        0.1, "Learning rate at the end of the schedule, as a fraction of its peak.", least=0, most=1
    )
    b1: float = setting(0.9, "Decay of AdamW's mean of gradients.", least=0, below=1)
    b2: float = setting(0.95, "Decay of AdamW's mean of squared gradients.", least=0, below=1)
    epsilon: float = setting(1e-8, "Added to the root of the mean square in AdamW.", least=0, finite=True)
    weight_decay: float = setting(
        0.1, "Decoupled weight decay, on matrices only; the dry run says which.", least=0, finite=True
    )
    clip_norm: float = setting(
        1.0, "Gradients with a larger global norm are scaled down to it. 0: no clipping.", least=0
    )
    accumulation_steps: int = setting(
        1,
        "A batch is computed in this many equal parts, one after the other, to save memory; divides batch_size.",
        least=1,
    )
    skip_deviations: float = setting(
        20.0,
        "A step whose gradient norm is this many standard deviations above the mean of earlier steps is skipped. 0: "
        "only steps whose loss or gradient is not finite are skipped.",
        least=0,
    )
    rollback_after: int = setting(
        3,
        "After this many skipped steps in a row the run returns to its last checkpoint and leaves their batches out.",
        least=1,
    )


@dataclasses.dataclass
class MeshConfig:
    """How many devices lie along each mesh axis; the product is the number of devices."""

    data: int = setting(-1, "Devices that the batch is cut over. -1: all that the other axes leave.")
    fsdp: int = setting(1, "Devices that the batch and every parameter are cut over.")
    tensor: int = setting(1, "Devices that heads, the feed-forward layer and the vocabulary are cut over.")
    context: int = setting(1, "Devices that the sequence is cut over. Only 1 is supported.")


@dataclasses.dataclass
class RunConfig:
    """What a run does and when. Intervals are in steps; 0 switches the thing off."""

    steps: int = setting(1000, "Steps after which the run stops. A finished run goes on with a larger number.", least=1)
    seed: int = setting(0, "Seed of the parameters and of the order of the data.", least=0, below=2**32)
    log_every: int = setting(10, "Steps between two lines of metrics.", least=0)
    eval_every: int = setting(250, "Steps between two evaluations.", least=0)
    eval_batches: int = setting(0, "Batches of an evaluation. 0: the whole evaluation split.", least=0)
    checkpoint_every: int = setting(250, "Steps between two checkpoints.", least=0)
    keep_checkpoints: int = setting(3, "How many of the newest checkpoints stay on disk.", least=1)
    sample_prompt: str = setting("def ", 'The model continues this text at the end of the run. "": no sample.')
    sample_tokens: int = setting(200, "Tokens of that sample.", least=0)
    tensorboard: bool = setting(False, 'Write curves to DIR/tensorboard too. Needs the extra "tensorboard".')
    statistics_every: int = setting(
        0,
        "Steps between two lines of DIR/statistics.jsonl: norms of each layer's parameters, gradients, activations.",
        least=0,
    )
    profile_steps: int = setting(0, "Steps, after the first two, that jax.profiler traces into DIR/profile.", least=0)
    compilation_cache: str = setting(
        "", 'A folder in which compiled programs are kept for the next start. "": as JAX_COMPILATION_CACHE_DIR says.'
    )


@dataclasses.dataclass
class Config:
    """The settings of a run."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    run: RunConfig = dataclasses.field(default_factory=RunConfig)
