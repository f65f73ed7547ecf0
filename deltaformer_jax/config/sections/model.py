"""The section `model`: sizes and choices of the language model."""

import dataclasses

from deltaformer_jax.config.fields import rule_of, setting


def _implementations() -> tuple[str, ...]:
    from deltaformer_jax.ops.common.dispatch import IMPLEMENTATIONS

    return IMPLEMENTATIONS


@dataclasses.dataclass
class ModelConfig:
    """Sizes and choices of the language model. Widths are numbers of features, windows numbers of tokens.

    A mixer uses the fields that its constructor names. If a field says `own=VALUE`, then VALUE leaves the choice to the
    mixer or to the op that it calls. None means the same, unless the field says `none=VALUE`: None then means VALUE.
    """

    vocab_size: int = setting(
        0,
        "Number of token ids. 0: the size of the data's tokenizer. A larger number than that is allowed, a "
        "smaller is not.",
        least=0,
    )
    d_model: int = setting(256, "Width of the residual stream, in features.", least=1)
    num_layers: int = setting(
        4,
        "Number of layers: blocks of one mixer and one feed-forward layer. A multiple of the number of "
        "entries of `mixers`.",
        least=1,
    )
    num_heads: int = setting(
        4, "Number of query heads. In mixers with a memory of fixed size, of query and key heads.", least=1
    )
    num_kv_heads: int = setting(
        4,
        "Number of key and value heads of the attention mixers; must divide num_heads. Other mixers don't use it.",
        least=1,
    )
    head_dim: int = setting(
        64, "Features per query and key head, and per value head unless value_dim says otherwise.", least=1
    )
    mlp_dim: int = setting(
        0,
        "Hidden width of the feed-forward layer, in features. 0: 8/3 d_model, rounded up to a multiple of 64, for "
        "swiglu and geglu; 4 d_model for the others.",
        least=0,
    )
    feed_forward: str = setting(
        "swiglu",
        'The feed-forward layer of a block. "swiglu", "geglu": (f(x W_gate) * x W_up) W_down with silu or gelu. '
        '"relu", "relu2", "gelu": f(x W_up) W_down. "memory": attention over trained keys and values. "moe": a mixture '
        "of experts, each a swiglu. An entry of `mixers` may have its own: Mixer(name, feed_forward=...).",
        choices=("swiglu", "geglu", "relu", "relu2", "gelu", "memory", "moe"),
    )
    feed_forward_similarity: str = setting(
        "softmax",
        'The similarity of a token and a key of feed_forward = "memory".',
        choices=("linear", "relu", "exp", "softmax"),
    )
    num_experts: int = setting(8, 'Number of experts of feed_forward = "moe".', least=1)
    experts_per_token: int = setting(
        2, 'Number of experts that a token of feed_forward = "moe" goes through. At most num_experts.', least=1
    )
    shared_experts: int = setting(
        0, 'Number of experts of feed_forward = "moe" that every token goes through besides.', least=0
    )
    expert_dim: int = setting(
        0,
        'Hidden width of an expert of feed_forward = "moe", in features. 0: that of a swiglu layer (mlp_dim) divided '
        "by experts_per_token + shared_experts, rounded up to a multiple of 8, so that a token costs as much as there.",
        least=0,
    )
    router: str = setting(
        "softmax",
        'How a token\'s experts are chosen and weighted. "softmax": the largest probabilities. "norm": the largest of '
        "relu(z / |z|) with a trained scale, as in UniPool.",
        choices=("softmax", "norm"),
    )
    renormalise_experts: bool = setting(
        True, "Whether the weights of a token's experts are divided by their sum. Without effect on router = norm."
    )
    expert_pool: bool = setting(
        False,
        "Whether all layers of experts share num_experts experts; each layer has a router of its own. The balance loss "
        "is then that of their use by all layers together.",
    )
    balance_loss: float = setting(
        0.01,
        "Weight in the loss of E sum_e f_e P_e, the mean over layers of experts: f_e the share of tokens that go to "
        "expert e, P_e its mean probability, over the tokens of a step (of a part of it with accumulation_steps). It "
        "is least, 1, where all experts are used alike.",
        least=0,
        finite=True,
    )
    router_z_loss: float = setting(
        0.0,
        "Weight in the loss of the mean square of the log-sum-exp of a router's logits, the mean over layers of "
        "experts.",
        least=0,
        finite=True,
    )
    mixers: tuple = setting(
        ("delta_former",),
        "The mixers of successive layers, as a pattern that repeats until num_layers is reached. An entry is "
        'the name of a mixer, Mixer(name or class, **overrides), or "package.module:Class" for a class of '
        "your own.",
        mixers=True,
    )
    tie_embeddings: bool = setting(
        True, "Whether the logits use the embedding table as their kernel. False: a kernel of their own."
    )
    norm_epsilon: float = setting(
        1e-6, "Added to the mean square inside every RMSNorm, so that it does not divide by 0.", above=0, finite=True
    )
    norm_gain: str = setting(
        "scale",
        'What the parameter of an RMSNorm holds: "scale": its gain. "one_plus_scale": its gain minus 1, as in Qwen\'s '
        "newer models. The norm of a recurrent mixer's output always holds its gain.",
        choices=("scale", "one_plus_scale"),
    )
    norm_placement: str = setting(
        "pre",
        'Where a block has its norms. "pre": x + mixer(norm(x)), x + mlp(norm(x)). "post": x + norm(mixer(x)), '
        "x + norm(mlp(x)). An entry of `mixers` may have its own: Mixer(name, norm_placement=...).",
        choices=("pre", "post"),
    )
    embedding_scale: str = setting(
        "sqrt_d_model",
        'Factor on the embedding of a token: "sqrt_d_model", or "one" as in most models from elsewhere.',
        choices=("sqrt_d_model", "one"),
    )
    normalise_head: bool = setting(
        False,
        "Whether the logits' kernel is normalised: the logit of a token is the product of the model's output with the "
        "token's vector of length 1, as in Baichuan-M1.",
    )
    compute_dtype: str = setting(
        "float32",
        "Dtype of activations and matrix products. Parameters and their gradients are always float32.",
        choices=("float32", "bfloat16"),
    )
    remat: str = setting(
        "none",
        'Which activations of a block the backward pass computes again, to save memory. "none": none; all are kept. '
        '"operands": what is elementwise between products and attention ops, whose operands are kept. '
        '"products": all but the results of products with kernels and of the attention ops. "kernels": all but the '
        'results of the attention ops, which cost most to compute and least to keep. "block": all. "auto": in '
        "training, the first of these with which the step fits the device's memory, found by compiling them in turn; "
        'elsewhere "block".',
        choices=("none", "operands", "products", "kernels", "block", "auto"),
    )
    unroll_layers: bool = setting(
        False,
        "Compile each layer by itself for training, in the place of one loop over all layers. The step then does not "
        "copy into and out of stacks what the backward pass keeps: fewer bytes, a faster step on GPUs. Compilation "
        "takes several times as long. Parameters and checkpoints are the same. Decoding is not changed.",
    )
    conv_size: int = setting(
        -1,
        "Width of short causal convolutions of queries, keys and values, in tokens. 0: none. -1: the mixer's "
        "default, which is 4 for the mixers of the delta rule (the names with delta_net, delta_product or "
        "kimi_delta) and 0 for the others.",
        least=0,
        own=-1,
        none=0,
    )
    output_gate: str = setting(
        "auto",
        "Whether a gate computed from the layer's input multiplies the mixer's output, before its last "
        'projection. "auto": on for retention, kimi_delta_attention and the names that begin with gated, off '
        "for the others. rwkv7 always has one.",
        choices=("on", "off"),
        own="auto",
        none="off",
        is_true="on",
    )

    output_norm_epsilon: float = setting(
        0.0,
        "The epsilon of the norm of a recurrent mixer's output. 0: norm_epsilon.",
        least=0,
        own=0.0,
        finite=True,
        must_be_used=True,
    )

    # Of the attention mixers softmax_attention and delta_former; rope_base of retention too. window, forget_gate,
    # alibi and sinks are softmax_attention's alone.

    rope_base: float = setting(
        10_000.0,
        "Base of the rotary embedding: the slowest pair of features turns by about 1/rope_base radian per "
        "token. 0: no rotary embedding.",
        above=1,
        none=0.0,
        zero_is_none=True,
        finite=True,
    )
    qk_norm: bool = setting(
        False, "Whether each query and key head is normalised by RMSNorm with a trained gain.", must_be_used=True
    )
    qk_norm_epsilon: float = setting(
        0.0, "The epsilon of qk_norm. 0: norm_epsilon.", least=0, own=0.0, finite=True, must_be_used=True
    )
    qk_norm_over: str = setting(
        "head",
        'What qk_norm normalises: "head": each head by itself, with one gain for all. "all_heads": all heads of a '
        "token together, with a gain for each feature of each.",
        choices=("head", "all_heads"),
        must_be_used=True,
    )
    qkv_bias: bool = setting(
        False, "Whether the projections of queries, keys and values have biases.", must_be_used=True
    )
    rotary_fraction: float = setting(
        1.0,
        "Fraction of each head's features, its first ones, that the rotary embedding rotates.",
        above=0,
        most=1,
        must_be_used=True,
    )
    rope_scaling: str = setting(
        "none",
        'Scaling of the rotary embedding for contexts longer than that of training: "none"; "linear:S" divides '
        'positions by S; "ntk:S" enlarges the base; "yarn:S,L" and "llama3:S,LOW,HIGH,L" scale the slow pairs of '
        "features by S, with L the original context.",
        must_be_used=True,
    )
    kv_shift: bool = setting(
        False,
        "Whether each key and value is mixed with the previous token's, with four trained numbers per key and "
        "value head.",
        must_be_used=True,
    )
    kv_shift_window: int = setting(
        2, "Number of tokens that kv_shift mixes, the token itself included.", least=2, must_be_used=True
    )
    kv_shift_parts: str = setting(
        "both",
        'What kv_shift mixes: "both", only the "key" or only the "value".',
        choices=("both", "key", "value"),
        must_be_used=True,
    )
    window: int = setting(
        0,
        "Number of tokens that a token sees, itself included. 0: itself and all tokens before it.",
        least=1,
        own=0,
        must_be_used=True,
    )
    forget_gate: bool = setting(
        False,
        "Whether scores decay by a forgetting gate. Each token computes one gate in (0, 1) "
        "per query head. If that token or a later one attends to a token before it, the gate's logarithm is "
        "added to the score.",
        must_be_used=True,
    )
    alibi: bool = setting(
        False,
        "Whether scores fall in proportion to the distance, with another slope for each query head (ALiBi). It is "
        "meant for models without a rotary embedding.",
        must_be_used=True,
    )
    position_bias: str = setting(
        "none",
        'A trained bias of scores by distance d, for models without a rotary embedding. "kerple": -p log(1 + a d) for '
        'each head. "fire": a small network of log(1 + c d) / log(1 + c max(L, position)). In delta_former: the read.',
        choices=("none", "kerple", "fire"),
        must_be_used=True,
    )
    fire_length: int = setting(
        512, "Where the L of position_bias = fire starts, in tokens.", least=1, must_be_used=True
    )
    dape_dim: int = setting(
        0,
        "Hidden features of DAPE, a network of all heads' scores and biases of a pair of tokens, which changes "
        "position_bias or alibi; 32 in its paper. 0: no DAPE.",
        least=0,
        must_be_used=True,
    )
    sinks: bool = setting(
        False,
        "Whether each query head has a sink: one more score, a trained number, whose value vector is 0.",
        must_be_used=True,
    )

    # Of every mixer's op.

    chunk_size: int = setting(
        0,
        "Tokens per chunk of the chunked implementations. 0: the op's default, 512 for delta_former and 64 "
        "for the mixers with a memory of fixed size. The kernels have chunk sizes of their own; "
        "softmax_attention does not use the field.",
        least=1,
        own=0,
    )
    implementation: str = setting(
        "",
        'Implementation of the mixer\'s op: "recurrent", "parallel", "chunked", "triton", "pallas_tpu", '
        '"cudnn" or "splash". "": the fastest one available for the platform. An op without the named one '
        "raises NotImplementedError.",
        choices=_implementations,
        own="",
    )

    # Of delta_former.

    write_query: str = setting(
        "key",
        'The write query w. "key": the token\'s key; "query": its query; "projected": a projection of its own.',
        choices=("key", "query", "projected"),
        must_be_used=True,
    )
    write_similarity: str = setting(
        "softmax",
        'Similarity of write queries and keys, by which a write is corrected: "linear", "relu", "exp", '
        '"softmax", "round", or "package.module:NAME" for one of your own.',
        importable=True,
        must_be_used=True,
    )
    read_similarity: str = setting(
        "softmax",
        "Similarity of queries and keys, by which the output is read. The same choices as for write_similarity.",
        importable=True,
        must_be_used=True,
    )
    write_rope_base: float = setting(
        -1.0,
        "Base of the rotary embedding in the scores of the write. -1: rope_base. 0: none, so that a write is "
        "corrected by content alone, however far back it stands. With another base than rope_base each token has two "
        "keys: the products of scores are twice as wide, and the cache is half as large again.",
        above=1,
        own=-1.0,
        none=0.0,
        zero_is_none=True,
        finite=True,
        must_be_used=True,
    )
    write_scale: float = setting(
        0.0,
        "Factor on the scores of the write. 0: 1 if its keys are normalised (write_key_norm), else head_dim ** -0.5.",
        own=0.0,
        must_be_used=True,
        finite=True,
    )
    read_scale: float = setting(
        0.0, "Factor on the scores of the read. 0: head_dim ** -0.5.", own=0.0, must_be_used=True, finite=True
    )
    write_key_norm: str = setting(
        "auto",
        "Whether the write compares directions: its scores are then cosines of write query and key, times "
        'write_scale. "auto": on for every write_similarity but softmax.',
        choices=("auto", "on", "off"),
        must_be_used=True,
    )
    alpha: str = setting(
        "off",
        'The factor α on a token\'s value when it is written. "off": 1. "sigmoid": sigmoid of a projection with bias.',
        choices=("off", "sigmoid"),
        must_be_used=True,
    )
    beta: str = setting(
        "sigmoid",
        'The factor β on the correction of a write. "sigmoid": sigmoid of a projection with bias. "raw": that '
        'projection itself, which may make the written values grow without bound. "one": 1.',
        choices=("sigmoid", "raw", "one"),
        must_be_used=True,
    )

    beta_bias: bool = setting(
        True,
        "Whether the projection of β has a bias, in delta_former and in the mixers of the delta rule; in "
        "gated_delta_net_2 those of its two gates.",
        must_be_used=True,
    )

    # Of the mixers with a memory of fixed size; num_value_heads and negative_eigenvalues of the delta rule's alone.

    num_value_heads: int = setting(
        0,
        "Number of value heads, a multiple of num_heads. 0: num_heads.",
        least=1,
        own=0,
        must_be_used=True,
    )
    value_dim: int = setting(0, "Features per value head. 0: head_dim.", least=1, own=0)
    negative_eigenvalues: bool = setting(
        False,
        "Whether β lies in (0, 2) instead of (0, 1). The state's transition may then have negative eigenvalues.",
        must_be_used=True,
    )
    householder_steps: int = setting(
        2,
        "Steps of the delta rule for each token, each with its own key, value and β, in delta_product and "
        "gated_delta_product. 1: delta_net and gated_delta_net.",
        least=1,
        must_be_used=True,
    )
    conv_bias: bool = setting(False, "Whether the short convolutions have biases.", must_be_used=True)
    input_silu: bool = setting(
        False,
        "Whether queries, keys and values pass through SiLU where there is no short convolution, which has its own.",
        must_be_used=True,
    )
    output_gate_activation: str = setting(
        "auto",
        'The activation of the output gate. "auto": sigmoid for kimi_delta_attention and '
        "gated_delta_net_2, swish for the others.",
        choices=("swish", "sigmoid"),
        own="auto",
        must_be_used=True,
    )
    output_gate_bias: bool = setting(
        False, "Whether the output gate of kimi_delta_attention or gated_delta_net_2 has a bias.", must_be_used=True
    )
    gate_rank: int = setting(
        0,
        "Rank of the low-rank projections of kimi_delta_attention, gated_delta_net_2 and rwkv7, to their decays and "
        "output gates. 0: head_dim and value_dim; in rwkv7 head_dim.",
        least=1,
        own=0,
        must_be_used=True,
    )
    decay_lower_bound: float = setting(
        0.0,
        "Lower bound L < 0 of the log decay of kimi_delta_attention or gated_delta_net_2, which is then L times a "
        "sigmoid. 0: no bound.",
        most=0,
        finite=True,
        must_be_used=True,
    )

    def __post_init__(self):
        self.mixers = tuple(self.mixers) if isinstance(self.mixers, list) else self.mixers
        for field in dataclasses.fields(self):
            # Replace None by the value that it stands for; config.json holds that value.
            setattr(self, field.name, rule_of(field).said(getattr(self, field.name)))
