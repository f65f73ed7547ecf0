"""A hybrid as in Baichuan-M1: softmax attention with a window and without one in turn, each with its own head shape.
Size and data are those of configs/deltaformer_340m.py.

341 million parameters, 15 billion tokens of FineWeb-edu. The feed-forward width is chosen to give that number, since
there are few KV heads. The docstring of deltaformer_340m.py says how to prepare the data. Command:

    python train.py --config baichuan_m1_340m --workdir runs/baichuan_m1_340m

Hardware: see deltaformer_340m.py.
Time: not measured. By arithmetic, 15e9 tokens at 2.26 GFLOP each are 3.4e19 FLOP.
Result: not measured.

Taken from Baichuan-M1 (arXiv 2502.12671): the alternation, KV shifting in every layer, the RoPE base of 1e6, and the
proportions of the heads. Baichuan-M1 has 40 query heads of dimension 128 over 8 KV heads with a window of 8192 tokens,
and 20 of 256 over 2 without a window. This config has 16 of 64 over 4 with a window of 512 tokens, a quarter of the
context, and 8 of 128 over 2 without a window. Baichuan-M1's normalised output head (model.normalise_head) is left out,
as its logits start from other values; its own is not tied to the embedding.
"""

from dataclasses import replace

from deltaformer_jax.config import Config, Mixer
from deltaformer_jax.config.files import packaged_config


def get_config() -> Config:
    budget = packaged_config("deltaformer_340m")
    return replace(
        budget,
        model=replace(
            budget.model,
            mixers=(
                Mixer("softmax_attention", num_heads=16, num_kv_heads=4, head_dim=64, window=512),
                Mixer("softmax_attention", num_heads=8, num_kv_heads=2, head_dim=128),
            ),
            kv_shift=True,
            rope_base=1e6,
            mlp_dim=3328,
        ),
    )
