"""The memory that reading a model takes."""

import os
import subprocess
import sys

import pytest

from deltaformer_jax import LanguageModel, ModelConfig
from deltaformer_jax.interop import save_pretrained

SHARD = 250_000_000
READ = """
import resource, sys
import jax
from flax import nnx
from deltaformer_jax.interop import load_pretrained
peak = lambda: 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
load_pretrained(sys.argv[1])  # a small one: what the program itself takes
before = peak()
model, _ = load_pretrained(sys.argv[2])
leaves = jax.block_until_ready(jax.tree.leaves(nnx.state(model)))
print(peak() - before, sum(leaf.nbytes for leaf in leaves))
"""


@pytest.mark.rare  # writes 1.2 GB
def test_peak_memory_is_the_model_and_little_more_than_one_shard(tmp_path):
    from flax import nnx

    sizes = dict(d_model=1024, num_layers=16, num_heads=16, num_kv_heads=16, head_dim=64)
    for name, config in {
        "small": ModelConfig(vocab_size=64, num_layers=1, embedding_scale="one"),
        "large": ModelConfig(vocab_size=32000, mlp_dim=4096, embedding_scale="one", **sizes),
    }.items():
        save_pretrained(LanguageModel(config, rngs=nnx.Rngs(0)), config, tmp_path / name, shard_bytes=SHARD)
    assert len(list((tmp_path / "large").glob("*.safetensors"))) >= 5
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", READ, tmp_path / "small", tmp_path / "large"]
    grown, model = map(int, subprocess.run(command, env=environment, capture_output=True, check=True).stdout.split())
    assert model > 1e9
    assert grown <= model + 1.2 * SHARD, f"{grown / 1e9:.2f} GB for a model of {model / 1e9:.2f} GB"
