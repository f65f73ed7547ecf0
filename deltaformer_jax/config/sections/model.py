"""The section `model`: sizes and choices of the language model. Its first fields are in `model_body.py`."""

import dataclasses

from deltaformer_jax.config.fields import rule_of, setting
from deltaformer_jax.config.sections.model_body import BodyFields


def _implementations() -> tuple[str, ...]:
    from deltaformer_jax.ops.common.dispatch import IMPLEMENTATIONS

    return IMPLEMENTATIONS


@dataclasses.dataclass
class ModelConfig(BodyFields):
    """Sizes and choices of the language model. Widths are numbers of features, windows numbers of tokens.

    A mixer uses the fields that its constructor names. If a field says `own=VALUE`, then VALUE leaves the choice to the
    mixer or to the op that it calls. None means the same, unless the field says `none=VALUE`: None then means VALUE.
    """

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

    # Of the attention mixers softmax_attention and delta_former; rope_base of retention too. forget_gate, alibi and
    # sinks are softmax_attention's alone.

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
    initial_tokens: int = setting(
        0,
        "Number of a document's first tokens that all its tokens see, behind the window too.",
        least=0,
        own=0,
        must_be_used=True,
    )
    separators: str = setting(
        "",
        "Characters, such as .;: and newline. The tokens whose text consists of them alone, found in the tokenizer "
        "when the run starts, are seen by all later tokens of their document, behind the window too (SepLLM).",
    )
    separator_tokens: tuple = setting(
        (), "The ids of such tokens. Programs find them by `separators`.", ids=True, must_be_used=True
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
        'each head. "fire": a small network of log(1 + c d) / log(1 + c max(L, position)).',
        choices=("none", "kerple", "fire"),
        must_be_used=True,
    )
    position_bias_in: str = setting(
        "read",
        "Whether delta_former's read, its write or both, each with its own numbers, have the position_bias.",
        choices=("read", "write", "both"),
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
        'Similarity of queries and keys, by which the output is read: "softmax" or, self-adjusted, "self_adjust" or '
        '"self_adjust_basic"; in delta_former also the choices of write_similarity.',
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
        for name in ("mixers", "separator_tokens"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, tuple(getattr(self, name)))
        for field in dataclasses.fields(self):
            # Replace None by the value that it stands for; config.json holds that value.
            setattr(self, field.name, rule_of(field).said(getattr(self, field.name)))
