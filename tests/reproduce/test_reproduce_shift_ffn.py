"""reproduce shift_ffn: what counts as a loop, and the smallest experiment."""

from types import SimpleNamespace

import numpy as np
import pytest
from etils import epath

from deltaformer_jax.reproduce.language import shift_ffn
from deltaformer_jax.reproduce.language.shift_ffn import before_loop, loop_period


@pytest.mark.parametrize("period", [1, 3, 64])
def test_a_loop_is_a_text_that_repeats_to_its_end(period):
    random = np.random.default_rng(period).permutation(512)  # no number twice
    loop = np.concatenate([random[:300], np.tile(random[300 : 300 + period], 512)[:212]])
    assert loop_period(loop) == period and before_loop(loop, period) == 300
    short = np.concatenate([random[:385], np.tile(random[385 : 385 + period], 512)[:127]])  # of 128, the first is not
    assert loop_period(short) is None and before_loop(short, None) == 512
    assert loop_period(np.concatenate([loop, random[-1:]])) is None  # it has ended
    whole = np.tile(random[:period], 512)[:512]
    assert loop_period(whole) == period and before_loop(whole, period) == 0


def test_no_longer_period_counts():
    assert loop_period(np.tile(np.arange(65), 8)) is None


def test_prompts_are_beginnings_of_one_document():
    ids = np.array([[1, 1, 1, 1], [1, 1, 2, 2], [0, 0, 3, 3], [4, 4, 4, 0]])
    rows = [{"tokens": np.arange(16).reshape(4, 4), "segment_ids": ids}]
    assert shift_ffn.beginnings(rows, 2, 3) == [[0, 1, 2], [12, 13, 14]]
    with pytest.raises(ValueError, match="2 rows that begin with 3 bytes of one document"):
        shift_ffn.beginnings(rows, 3, 3)


@pytest.mark.long
def test_the_smallest_form(tmp_path):
    """Four checkpoints, whose measures the table and the picture show; a second call makes them again, trained."""
    sizes = dict(
        model=dict(d_model=16, num_layers=1, num_heads=1, head_dim=16, sequence_length=64, batch_size=2, steps=4),
        measures=dict(eval_batches=1, measured_batches=1, prompts=2, prompt_bytes=8, continuation=130),
        seeds=(0,),
    )
    cells = shift_ffn.cells(True, sizes)
    counts = [cell["parameters"] for cell in cells]
    assert max(counts) - min(counts) < 0.05 * min(counts) and len({cell["mlp_dim"] for cell in cells}) > 1
    cell, stop = next(cell for cell in cells if cell["model"] == shift_ffn.EDITOR), SimpleNamespace(requested=False)
    folder = epath.Path(tmp_path) / "cell"
    folder.mkdir()
    result = shift_ffn.run(cell, folder, lambda text: None, stop)
    assert [one["step"] for one in result["checkpoints"]] == [1, 2, 3, 4]
    assert all(one["bits"] > 0 and len(one["change"]) == 1 for one in result["checkpoints"])
    assert shift_ffn.run(cell, folder, lambda text: None, stop) == result
