"""Positions of a short row stretched over a longer context."""

import jax
import numpy as np
import pytest

from deltaformer_jax.training.objectives.stretched import stretched


@pytest.mark.parametrize("skip", ["uniform", "cream"])
@pytest.mark.parametrize("original, length", [(12, 48), (16, 17), (30, 100), (64, 64), (9, 900)])
def test_positions_grow_from_0_to_the_last(skip, original, length):
    positions = np.asarray(stretched(jax.random.key(0), 200, original, length, skip))
    assert positions.shape == (200, original) and positions.dtype == np.int32
    assert (np.diff(positions, axis=1) > 0).all()
    assert (positions[:, 0] == 0).all() and (positions[:, -1] == length - 1).all()
    if length == original:
        assert (positions == np.arange(original)).all()
    # Three parts without gaps: at most two steps of a row are longer than 1.
    assert ((np.diff(positions, axis=1) > 1).sum(axis=1) <= 2).all()


def test_where_the_middle_part_lies():
    """Heads of a third and of 4 · 4 tokens alike often; "uniform" anywhere, "cream" as its normal distribution says."""
    rows, original, length = 4000, 96, 384
    error = 4.5 * (0.25 / rows) ** 0.5
    ends = {}
    for skip in ("uniform", "cream"):
        positions = np.asarray(stretched(jax.random.key(1), rows, original, length, skip))
        head = np.where((positions[:, :32] == np.arange(32)).all(axis=1) & (positions[:, -32] == length - 32), 32, 16)
        assert (
            abs((head == 32).mean() - 0.5) < error + 0.02
        )  # a head of 16 whose middle follows it looks like one of 32
        long = head == 32
        ends[skip] = positions[long, original - 32 - 1]
        assert ends[skip].min() >= original - 32 - 1 and ends[skip].max() <= length - 32 - 1
    low, high = original - 32 - 1, length - 32 - 1
    n = len(ends["uniform"])
    assert abs(ends["uniform"].mean() - (low + high) / 2) < 4.5 * (high - low + 1) / (12 * n) ** 0.5
    # cream's a: floor(clip(N(5, 5), 2, 8)); its end is uniform between the two bounds of the docstring.
    draw = np.random.default_rng(0)
    a = np.floor(np.clip(draw.normal(5, 5, 400_000), 2, 8))
    least, most = np.floor(32 + 31 * a / 2), np.floor(a / 2 * original) - 33
    expected = np.minimum((np.minimum(least, most) + most) / 2, high)
    assert abs(ends["cream"].mean() - expected.mean()) < 4.5 * (high - low) / len(ends["cream"]) ** 0.5
