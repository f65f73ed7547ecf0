"""reproduce unipool: its models, what is said of the use of a pool, and the smallest experiment."""

from types import SimpleNamespace

import numpy as np
import pytest
from etils import epath

from deltaformer_jax.reproduce.language import unipool


def test_experts_and_router_are_changed_one_at_a_time():
    sizes = {"experts_of_a_layer": 4, "num_layers": 6}
    of = {model: unipool.fields(model, sizes) for model in unipool.MODELS}
    assert {model: (f["expert_pool"], f["num_experts"], f["router"]) for model, f in of.items()} == {
        "own, softmax": (False, 4, "softmax"),
        "own, norm": (False, 4, "norm"),
        "pool, softmax": (True, 24, "softmax"),
        "pool, norm": (True, 24, "norm"),
        "1/2 pool, norm": (True, 12, "norm"),
    }


def test_use_of_a_pool():
    """Two layers with two experts each: apart, an expert serves one layer; evenly together, it serves two."""
    np.testing.assert_allclose(unipool.used(np.array([[5, 5, 0, 0], [0, 0, 5, 5]])), [2, 1])
    np.testing.assert_allclose(unipool.used(np.array([[5, 5], [5, 5]])), [2, 2])
    np.testing.assert_allclose(unipool.used(np.array([[8, 0, 0], [0, 8, 0]])), [1, 1])  # and one that nobody uses


def test_only_seeds_that_both_models_have_are_paired():
    bits = {("pool, norm", 0): 2.0, ("own, softmax", 0): 2.1, ("pool, norm", 1): 2.2, ("own, softmax", 1): 2.4}
    bits["pool, norm", 2] = 9.0
    done = [{"settings": dict(model=m, seed=seed), "result": {"bits": value}} for (m, seed), value in bits.items()]
    np.testing.assert_allclose(unipool.paired(done, "pool, norm"), [-0.1, -0.2])
    assert not len(unipool.paired(done, "own, norm"))


@pytest.mark.long
def test_the_smallest_form(tmp_path):
    """Every layer sends every token of the counted batches to one expert of the half pool."""
    sizes = dict(d_model=16, num_layers=2, num_heads=1, head_dim=16, mlp_dim=16, experts_of_a_layer=2)
    sizes |= dict(sequence_length=64, batch_size=2, steps=2, eval_batches=1, routed_batches=2, seeds=(0,))
    cell = unipool.cells(True, sizes)[-1]
    folder = epath.Path(tmp_path) / "cell"
    folder.mkdir()
    result = unipool.run(cell, folder, lambda text: None, SimpleNamespace(requested=False))
    counts = np.array(result["counts"])
    assert counts.shape == (2, 2) and 0.9 * 256 < counts[0].sum() <= 256
    assert len(set(counts.sum(axis=1))) == 1 and result["bits"] > 0 and result["expert_load"] >= 1
