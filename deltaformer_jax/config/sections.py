"""The settings of a run: one dataclass per section. Each field states its type, default and allowed values (fields.py).

A config file is a Python file with a function `get_config()` that returns a `Config`. A flag such as
`--config.model.d_model=256` overrides one field. The comment directly above a field says what it means.
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

    A mixer uses the fields that its constructor names. If a field says `own=VALUE`, then VALUE leaves the choice to the
    mixer or to the op that it calls. None means the same, unless the field says `none=VALUE`: None then means VALUE.
    """

    # Number of token ids. 0: the size of the data's tokenizer. A larger number than that is allowed, a smaller is not.
    vocab_size: int = setting(0, least=0)
    # Width of the residual stream, in features.
    d_model: int = setting(256, least=1)
    # Number of layers: blocks of one mixer and one feed-forward layer. A multiple of the number of entries of `mixers`.
    num_layers: int = setting(4, least=1)
    # Number of query heads. In mixers with a memory of fixed size, of query and key heads.
    num_heads: int = setting(4, least=1)
    # Number of key and value heads of the attention mixers; must divide num_heads. Other mixers don't use it.
    num_kv_heads: int = setting(4, least=1)
    # Features per query and key head, and per value head unless value_dim says otherwise.
    head_dim: int = setting(64, least=1)
    # Hidden width of the feed-forward layer, in features. 0: 8/3 d_model, rounded up to a multiple of 64.
    mlp_dim: int = setting(0, least=0)
    # The mixers of successive layers, as a pattern that repeats until num_layers is reached. An entry is the name of a
    # mixer, Mixer(name or class, **overrides), or "package.module:Class" for a class of your own.
    mixers: tuple = ("delta_former",)
    # Whether the logits use the embedding table as their kernel. False: a kernel of their own.
    tie_embeddings: bool = True
    # Added to the mean square inside every RMSNorm, so that it does not divide by 0.
    norm_epsilon: float = setting(1e-6, above=0, finite=True)
    # Dtype of activations and matrix products. Parameters and their gradients are always float32.
    compute_dtype: str = setting("float32", choices=("float32", "bfloat16"))
    # "block": recompute each block's activations in the backward pass, which saves memory. "none": keep them.
    remat: str = setting("none", choices=("none", "block"))
    # Width of short causal convolutions of queries, keys and values, in tokens. 0: none. -1: the mixer's default, which
    # is 4 for delta_net, gated_delta_net and kimi_delta_attention and 0 for the others.
    conv_size: int = setting(-1, least=0, own=-1, none=0)
    # Whether a gate computed from the layer's input multiplies the mixer's output, before its last projection. "auto":
    # on for retention, gated_linear_attention, gated_delta_net and kimi_delta_attention, off for the others.
    output_gate: str = setting("auto", choices=("on", "off"), own="auto", none="off", is_true="on")

    # Of the attention mixers softmax_attention and delta_former; rope_base of retention too.

    # Base of the rotary embedding: the slowest pair of features turns by about 1/rope_base radian per token. Must be
    # above 1. 0: no rotary embedding.
    rope_base: float = setting(10_000.0, none=0.0, zero_is_none=True, finite=True)
    # Whether each query and key head is normalised by RMSNorm with a trained gain.
    qk_norm: bool = setting(False, must_be_used=True)
    # Whether each key and value is mixed with the previous token's, with four trained numbers per key and value head.
    kv_shift: bool = setting(False, must_be_used=True)
    # softmax_attention: number of tokens that a token sees, itself included. 0: itself and all tokens before it.
    window: int = setting(0, least=1, own=0, must_be_used=True)
    # softmax_attention: whether scores decay by a forgetting gate. Each token computes one gate in (0, 1) per query
    # head. If that token or a later one attends to a token before it, the gate's logarithm is added to the score.
    forget_gate: bool = setting(False, must_be_used=True)
    # softmax_attention: whether each query head has a sink: one more score, a trained number, whose value vector is 0.
    sinks: bool = setting(False, must_be_used=True)

    # Of every mixer's op.

    # Tokens per chunk of the chunked implementations. 0: the op's default, 512 for delta_former and 64 for the mixers
    # with a memory of fixed size. The kernels have chunk sizes of their own; softmax_attention does not use the field.
    chunk_size: int = setting(0, least=1, own=0)
    # Implementation of the mixer's op: "recurrent", "parallel", "chunked", "triton", "pallas_tpu", "cudnn" or "splash".
    # "": the fastest one available for the platform. An op without the named one raises NotImplementedError.
    implementation: str = setting("", choices=_implementations, own="")

    # Of delta_former.

    # The write query w. "key": the token's key; "query": its query; "projected": a projection of its own.
    write_query: str = setting("key", choices=("key", "query", "projected"), must_be_used=True)
    # Similarity of write queries and keys, by which a write is corrected: "linear", "relu", "exp", "softmax", "round",
    # or "package.module:NAME" for one of your own.
    write_similarity: str = setting("softmax", importable=True, must_be_used=True)
    # Similarity of queries and keys, by which the output is read. The same choices as for write_similarity.
    read_similarity: str = setting("softmax", importable=True, must_be_used=True)
    # Factor on the scores of the write. 0: 1 if its keys are normalised (write_key_norm), else head_dim ** -0.5.
    write_scale: float = setting(0.0, own=0.0, must_be_used=True, finite=True)
    # Factor on the scores of the read. 0: head_dim ** -0.5.
    read_scale: float = setting(0.0, own=0.0, must_be_used=True, finite=True)
    # Whether the write compares directions: its scores are then cosines of write query and key, times write_scale.
    # "auto": on for every write_similarity but softmax.
    write_key_norm: str = setting("auto", choices=("auto", "on", "off"), must_be_used=True)
    # The factor α on a token's value when it is written. "off": 1. "sigmoid": sigmoid of a projection with bias.
    alpha: str = setting("off", choices=("off", "sigmoid"), must_be_used=True)
    # The factor β on the correction of a write. "sigmoid": sigmoid of a projection with bias. "raw": that projection
    # itself, which may make the written values grow without bound. "one": 1.
    beta: str = setting("sigmoid", choices=("sigmoid", "raw", "one"), must_be_used=True)

    # Of the mixers with a memory of fixed size.

    # delta_net and gated_delta_net: number of value heads, a multiple of num_heads. 0: num_heads.
    num_value_heads: int = setting(0, least=1, own=0, must_be_used=True)
    # Features per value head. 0: head_dim.
    value_dim: int = setting(0, least=1, own=0)
    # delta_net, gated_delta_net and kimi_delta_attention: whether β lies in (0, 2) instead of (0, 1). The state's
    # transition may then have negative eigenvalues.
    negative_eigenvalues: bool = setting(False, must_be_used=True)

    def __post_init__(self):
        self.mixers = tuple(self.mixers) if isinstance(self.mixers, list) else self.mixers
        for field in dataclasses.fields(self):
            # Replace None by the value that it stands for; config.json holds that value.
            setattr(self, field.name, rule_of(field).said(getattr(self, field.name)))


def on_any_device(model: ModelConfig) -> ModelConfig:
    """The same model with the choice of implementation left to the ops.

    The parameters are the same; results differ by rounding. It serves programs that read a run trained on another
    platform, and decoding: a named kernel cannot resume from a cache.
    """

    def free(mixer):
        if not isinstance(mixer, Mixer) or is_import(
            mixer.name
        ):  # a class of one's own may give the argument another meaning
            return mixer
        others = {field: value for field, value in mixer.overrides if field != "implementation"}
        return Mixer(mixer.name, **others)

    return dataclasses.replace(model, implementation="", mixers=tuple(map(free, model.mixers)))


@dataclasses.dataclass
class DataConfig:
    """The text or task to train on, and the shape of a batch."""

    # What to train on. "": the running Python's standard library. "FOLDER": a corpus that deltaformer_jax.data.prepare
    # made; a gs:// folder is copied to this machine once. "FOLDER=WEIGHT,FOLDER=WEIGHT": several corpora, mixed so that
    # each gives its weight's share of the rows. "task:NAME,option=value": a synthetic task of deltaformer_jax.tasks;
    # each row is one example.
    path: str = ""
    # Tokenizer of the standard library's text, when path is "": "bytes", the path of a tokenizer.json, or "bpe:SIZE",
    # which learns a tokenizer of SIZE tokens from the text. Other data has a tokenizer of its own.
    tokenizer: str = "bytes"
    # For one prepared corpus without evaluation documents, such as one long text: the fraction at the end of each
    # document that is kept from training and used for evaluation. 0: none.
    eval_tail: float = setting(0.0, least=0, below=1)
    # Tokens per row. Documents are laid end to end and cut into rows; a token sees its own document only.
    sequence_length: int = setting(256, least=1)
    # Rows per step, over all devices and hosts. A multiple of mesh.data * mesh.fsdp * optimizer.accumulation_steps.
    batch_size: int = setting(16, least=1)


@dataclasses.dataclass
class OptimizerConfig:
    """AdamW and its learning-rate schedule. Steps of the schedule count updates, not skipped steps."""

    # Peak learning rate, reached at the end of the warm-up.
    learning_rate: float = setting(1e-3, least=0, finite=True)
    # Updates over which the rate rises linearly to its peak. 0: no warm-up.
    warmup_steps: int = setting(50, least=0)
    # Length of the whole schedule in updates, warm-up included. Later updates use the final rate.
    decay_steps: int = setting(1000, least=1)
    # After the warm-up: "cosine" decays along a half cosine; "wsd" (warm-up, stable, decay) stays at the peak, then
    # decays linearly; "constant" stays at the peak for ever.
    schedule: str = setting("cosine", choices=("cosine", "wsd", "constant"))
    # Schedule "wsd": the fraction of decay_steps, at its end, over which the rate decays.
    wsd_decay_fraction: float = setting(0.2, least=0, most=1)
    # The rate at the end of the schedule, as a fraction of learning_rate. Not used by "constant".
    final_learning_rate: float = setting(0.1, least=0, most=1)
    # Adam's decay of the running mean of gradients, per update.
    b1: float = setting(0.9, least=0, below=1)
    # Adam's decay of the running mean of squared gradients, per update.
    b2: float = setting(0.95, least=0, below=1)
    # Adam's epsilon, added to the root of the mean squared gradient.
    epsilon: float = setting(1e-8, least=0, finite=True)
    # AdamW's weight decay, multiplied by the learning rate. Norm gains, biases and numbers per head are exempt.
    weight_decay: float = setting(0.1, least=0, finite=True)
    # Largest global norm of the gradient; a longer gradient is scaled down to it. 0: no clipping.
    clip_norm: float = setting(1.0, least=0)
    # Number of equal parts that a batch is cut into. Their gradients are computed one after the other and added,
    # weighted by their numbers of tokens: the same update with less memory.
    accumulation_steps: int = setting(1, least=1)
    # Steps with unusual gradients are skipped: those whose loss or gradient norm is not finite, and, after the first 20
    # updates, those whose gradient norm is more than this many standard deviations above the mean of about the last 50
    # updates. 0: only steps that are not finite are skipped.
    skip_deviations: float = setting(20.0, least=0)
    # After this many skipped steps in a row, the run goes back to its last checkpoint and leaves out their batches.
    rollback_after: int = setting(3, least=1)


@dataclasses.dataclass
class MeshConfig:
    """Number of devices along each axis of the mesh. The product of the four is the number of devices."""

    # Number of devices that split the rows of a batch; each has a copy of the parameters. -1: all devices that the
    # other axes leave.
    data: int = -1
    # Number of devices that split the rows of a batch, and also the parameters and the optimiser's state (fully sharded
    # data parallelism).
    fsdp: int = 1
    # Number of devices that split the heads, the feed-forward layer's width and the vocabulary (tensor parallelism).
    tensor: int = 1
    # Number of devices that split a sequence. Only 1 is supported.
    context: int = 1


@dataclasses.dataclass
class RunConfig:
    """What a run does and when. Intervals are in steps; an interval of 0 switches its action off."""

    # Number of steps in all, those before a resume included. A step takes one batch; skipped steps count too.
    steps: int = setting(1000, least=1)
    # Seed of the initial parameters, of the order of the data or the examples of a task, and of the sample at the end.
    seed: int = setting(0, least=0, below=2**32)
    # Steps between records of loss, speed, gradient norm and learning rate in DIR/metrics.jsonl; the first step is
    # recorded too. 0: none.
    log_every: int = setting(10, least=0)
    # Steps between evaluations; the last step is evaluated too. 0: no evaluation at all.
    eval_every: int = setting(250, least=0)
    # Batches of the evaluation split per evaluation. 0: all of it.
    eval_batches: int = setting(0, least=0)
    # Steps between checkpoints; the last state, or the one at an interruption, is saved too. 0: only that.
    checkpoint_every: int = setting(250, least=0)
    # Number of the newest checkpoints that are kept.
    keep_checkpoints: int = setting(3, least=1)
    # Prompt of the text that the model continues at the end of the run. "": no sample.
    sample_prompt: str = "def "
    # Length of that sample in tokens. 0: no sample.
    sample_tokens: int = setting(200, least=0)
    # Whether the curves are also written for TensorBoard, to DIR/tensorboard. Needs the extra "tensorboard".
    tensorboard: bool = False
    # Steps between records of the norms of every layer's parameters, gradients and activations, which are written to
    # DIR/statistics.jsonl; the first step is recorded too. 0: none.
    statistics_every: int = setting(0, least=0)
    # Number of steps that jax.profiler traces, into DIR/profile. It begins after the process's first two. 0: none.
    profile_steps: int = setting(0, least=0)
    # Folder, also gs://, that keeps compiled programs for later processes. "": what JAX_COMPILATION_CACHE_DIR says.
    compilation_cache: str = ""


@dataclasses.dataclass
class Config:
    """All settings of a run, by section."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    run: RunConfig = dataclasses.field(default_factory=RunConfig)
