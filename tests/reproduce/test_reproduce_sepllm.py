"""reproduce sepllm: what it counts, and that it measures masks."""

import numpy as np
import pytest
from etils import epath

from deltaformer_jax.host.interruption import Interruption
from deltaformer_jax.reproduce.language import sepllm


def test_the_share_of_the_cache_that_sepllm_sees():
    """Against pairs of tokens, one by one, in rows of documents and padding."""
    random = np.random.default_rng(0)
    ids = np.array([[1] * 7 + [2] * 9 + [0] * 4, [0] * 3 + [4] * 17])
    batches = [{"tokens": random.integers(0, 6, ids.shape), "segment_ids": ids} for _ in range(2)]
    for window, initial, separators in ((0, 0, ()), (3, 0, ()), (3, 2, ()), (3, 2, (1, 5)), (0, 2, (1,))):
        seen = causal = 0
        for batch in batches:
            for row, document in zip(batch["tokens"], ids):
                for t in np.flatnonzero(document):
                    start = np.flatnonzero(document == document[t])[0]
                    for i in range(start, t + 1):
                        causal += 1
                        seen += not window or t - i < window or i - start < initial or row[i] in separators
        assert sepllm.visible_share(batches, window, initial, separators) == seen / causal


@pytest.mark.long
def test_masks_of_a_trained_model_in_a_few_steps(tmp_path):
    """A window as long as the rows hides nothing, one of two bytes does."""
    sizes = dict(sepllm.QUICK, d_model=8, head_dim=8, mlp_dim=8, sequence_length=32, steps=2, window=32)
    cells = {cell["label"]: cell for cell in sepllm.cells(False, sizes)}
    full, *_, whole = (cells[f"DeltaFormer, {name}"] for name in ("full", "SepLLM", "SepLLM H and T"))
    full["masks"]["two"] = {"window": 2}
    result = sepllm.run(full, epath.Path(tmp_path / "full"), print, Interruption())
    masked = result["masked"]
    assert result["share"] == 1 and masked.keys() == {"window", "window + initial", "SepLLM", "two"}
    np.testing.assert_allclose([masked[name] for name in ("window", "SepLLM")], result["bits"], rtol=1e-5)
    assert abs(masked["two"] - result["bits"]) > 1e-5
    # Of two layers both are full.
    assert (
        whole["mixers"] == [["delta_former", {"window": 0}]] * 2 and whole["fields"]["separators"] == sepllm.SEPARATORS
    )
