"""The part of the section `model` that is not the mixers': sizes, feed-forward layers, norms, memory."""

import dataclasses

from deltaformer_jax.config.fields import setting


@dataclasses.dataclass
class BodyFields:
    """The first fields of ModelConfig."""

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
    ffn_shift_rank: int = setting(
        0, "Rank of what the previous token adds to the input of a feed-forward layer (Shift-FFN). 0: nothing.", least=0
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
        True,
        "Whether the weights of a token's experts are divided by their sum. With experts_per_token = 1 every weight is "
        "then 1, and only the balance loss trains the router: set it to False. Without effect on router = norm.",
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
