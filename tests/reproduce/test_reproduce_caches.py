"""The experiments with caches of chosen entries, on a model that learnt nothing."""

import types

import numpy as np
import pytest
from flax import nnx

from deltaformer_jax import LanguageModel, ModelConfig
from deltaformer_jax.reproduce.language import streaming
from deltaformer_jax.reproduce.recall import eviction

pytestmark = pytest.mark.long

SIZES = dict(d_model=16, num_layers=2, num_heads=1, num_kv_heads=1, head_dim=16, mlp_dim=16, implementation="recurrent")


def model_of(mixer, vocabulary, **sizes):
    return LanguageModel(ModelConfig(vocab_size=vocabulary, mixers=(mixer,), **SIZES | sizes), rngs=nnx.Rngs(0))


def test_readings_agree_where_nothing_is_dropped_and_have_the_stated_size():
    """The first 32 bytes are read alike in every way, and the cache has the entries and bytes of the formulas."""
    settings = streaming.cells(True, {**streaming.QUICK, "whole": 2048, "part": 512, "all": 256})[0]
    settings |= {"sequence_length": 32, "rules": {streaming.SEPARATORS: [1, 2, 13, 32], streaming.LAST: [0, 0, 16, 32]}}
    found = streaming._readings(
        settings, model_of("softmax_attention", 257), print, types.SimpleNamespace(requested=False)
    )
    assert found.keys() == {"separators", "last", "all", "ring", "anew"}
    first = [read["bits"][0] for read in found.values()]
    np.testing.assert_allclose(first, first[0], atol=2e-4)  # bits are rounded to 1e-4
    assert found["separators"]["edges"] == [0, 32, 128, 512, 2048]
    assert [found[name]["most_entries"] for name in ("separators", "last")] == [32, 32]
    # (window + capacity + initial + separators) / 2, and half an entry: the new token is there when it is counted.
    assert found["separators"]["mean_entries"] == pytest.approx((13 + 32 + 1 + 2) / 2 + 0.5, abs=0.3)
    slots, bytes_of_slot = 32, 2 * 2 * 16 * 4  # two layers of keys and values in float32, and what says where they are
    assert found["separators"]["bytes"] == slots * (bytes_of_slot + 2 * (4 + 1)) + 2 * 4


def test_an_eviction_of_nothing_changes_no_answer():
    """All policies answer alike at a share of 1, as the model without a cache, and differ below."""
    settings = eviction.cells(True, {**eviction.QUICK, "stages": ((16, 4, 8, 0.99),), "rows": 64})[1]
    model = model_of("delta_former", 32)
    found = eviction._measured({**settings, "shares": [0.25, 1.0]}, model)
    assert found["entries"] == [2, 8] and found["evicted"].keys() == set(eviction.policies("DeltaFormer"))
    accuracies = list(found["evicted"].values())
    task = eviction.make_task(settings["task"][-1], 16)
    examples = task(eviction.EVALUATION_SEED, np.arange(64))
    answers = np.argmax(np.asarray(model(examples.tokens)[0]), axis=-1)
    expected = np.mean((answers == examples.targets)[examples.counted])
    assert all(abs(whole - expected) < 0.01 for _, whole in accuracies)  # a near tie may be decided otherwise


@pytest.mark.rare  # the test above with two heads, whose parts tests/ops/selection/test_ops_by_head.py has
def test_an_eviction_of_nothing_by_head():
    """Both policies of a model of two heads answer alike at a share of 1."""
    sizes = {**eviction.QUICK, "stages": ((16, 4, 8, 0.99),), "rows": 64, "heads": (2,)}
    settings = eviction.cells(True, sizes)[0]
    assert settings["model"]["num_kv_heads"] == 2
    model = model_of("softmax_attention", 32, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=8)
    found = eviction._measured({**settings, "shares": [0.5, 1.0]}, model)
    assert list(found["evicted"]) == [eviction.QUERIES, eviction.BY_HEAD]
    (_, row), (_, heads) = found["evicted"].values()
    assert abs(row - heads) < 0.01
