"""The bound that a rotary embedding's base sets to the context, and the warning of a config that breaks it."""

import numpy as np
import pytest

from deltaformer_jax.config import Config, DataConfig, Mixer, ModelConfig
from deltaformer_jax.config.remarks import remarks
from deltaformer_jax.config.remarks.rotary_bound import beyond_bound, first_negative, frequencies, least_base, sums

WIDTHS = (32, 64, 128)


@pytest.mark.parametrize(
    "longest, expected",
    [
        (64, [320, 170, 110]),
        (128, [1_300, 480, 320]),
        (256, [2_200, 1_500, 890]),
        (512, [14_000, 5_400, 2_100]),
        (1024, [59_000, 7_800, 4_300]),
        (2048, [210_000, 37_000, 16_000]),
    ],
)
def test_the_least_base_of_a_context(longest, expected):
    """Computed with numpy by another program, by the definition. This is arithmetic, the same on every machine."""
    assert [least_base(longest, 10.0, width) for width in WIDTHS] == expected


@pytest.mark.parametrize(
    "width, expected", [(32, [5, 28, 122, 474, 1283]), (64, [5, 46, 197, 725, 3616]), (128, [5, 59, 361, 1707, 7757])]
)
def test_the_first_distance_that_breaks_the_bound(width, expected):
    assert [first_negative(frequencies(base, width), 8000) for base in (10, 100, 1e3, 1e4, 1e5)] == expected


def test_least_base_is_the_least():
    """Against every base of two digits below it, each by itself."""
    longest, found = 300, least_base(300, 10.0, 128)
    positive = lambda base: (sums(frequencies(base, 128), 1, longest) >= 0).all()
    bases = [digits * 10.0**power for power in range(0, 3) for digits in range(10, 100)]
    assert positive(found) and not any(positive(base) for base in bases if base < found)


def test_the_least_base_is_no_smaller_than_its_start_and_may_not_exist():
    assert least_base(64, 12_345.0, 64) == 13_000
    assert least_base(64, 13_000.0, 64) == 13_000
    assert least_base(64, 10.0, 2) is None  # the sum is cos m, whatever the base
    (line,) = beyond_bound(model(rotary_fraction=2 / 64), 64)
    assert line.endswith("No base of this width is without such a distance")


@pytest.mark.parametrize("scaling", ["linear:3", "ntk:4", "yarn:4,512", "llama3:8,1,4,512"])
def test_the_least_base_is_that_of_the_scaling(scaling):
    (line,) = beyond_bound(model(rope_base=1e3, rope_scaling=scaling), 2048)
    base = float(line.rsplit(maxsplit=1)[1])
    assert not beyond_bound(model(rope_base=base, rope_scaling=scaling), 2048)
    digits, zeros = round(base / 10.0 ** (len(f"{base:.0f}") - 2)), len(f"{base:.0f}") - 2
    before = (digits - 1) * 10.0**zeros
    assert beyond_bound(model(rope_base=before, rope_scaling=scaling), 2048), "a smaller base would have done"


def test_the_theorem_by_drawing():
    """E[qᵀR_m(q + ε)] − E[qᵀR_m k] = 2σ²B_m for independent components of any mean, at 40 distances and bases.

    With variances σ² and τ² of a pair's two components it is Σ (σ_i² + τ_i²) cos(m θ_i), the paper's appendix A. Within
    4.5 standard errors of the mean of the draws: one false alarm in 1,800 of 80 such.
    """
    draw, width, mean, count = np.random.default_rng(0), 16, 0.7 - 0.4j, 20_000
    equal, unequal = np.full((width // 2, 2), 1.3), draw.uniform(0.2, 2.0, (width // 2, 2))
    for sigma in (equal, unequal):
        vectors = lambda sigma=sigma: mean + sigma * draw.standard_normal((count, width // 2, 2)) @ np.array([1, 1j])
        query, key, noise = vectors(), vectors(), 0.1 * (vectors() - mean)
        for base in (10, 100, 1e3, 1e4):
            for distance in (1, 2, 3, 5, 8, 13, 21, 34, 55, 89):
                theta = frequencies(base, width)
                difference = query.conj() * np.exp(1j * distance * theta) * (query + noise - key)
                difference = np.real(difference).sum(axis=1)
                expected = (sigma**2).sum(axis=1) @ np.cos(distance * theta)
                if sigma is equal:
                    np.testing.assert_allclose(expected, 2 * 1.3**2 * sums(theta, distance, distance)[0])
                assert abs(difference.mean() - expected) < 4.5 * difference.std() / count**0.5, (base, distance)


def model(mixers=("softmax_attention",), **fields):
    return ModelConfig(mixers=mixers, head_dim=64, **fields)


def test_the_warning():
    (line,) = remarks(Config(model=model(), data=DataConfig(path="x", sequence_length=2048)))
    assert line == (
        "model.rope_base = 10000: at 87 of the distances up to 2048, from 725 on, attention scores a key like the "
        "query below others (heads of 64 rotated features; arXiv 2405.14591). The least base of two digits without such"
        " a distance is 37000"
    )


def test_a_long_contexts_warning_searches_for_no_base():
    (line,) = beyond_bound(model(), 8193)
    assert line.startswith("model.rope_base = 10000: at ") and line.endswith("arXiv 2405.14591)")


@pytest.mark.parametrize(
    "given, length, starts",
    [
        (model(), 724, []),
        (model(), 725, ["model.rope_base = 10000: at 1 of"]),
        (model(rope_base=1e5), 2048, []),
        (model(rope_base=0.0), 2048, []),
        (model(("delta_former",), rope_base=1e5, write_rope_base=1e4), 725, ["model.write_rope_base = 10000: at 1 of"]),
        (model(("delta_former",), write_rope_base=1e4), 725, ["model.rope_base = 10000: at 1 of"]),
        (model(("delta_former",), rope_base=1e5, write_rope_base=0.0), 2048, []),
        (model(window=512), 4096, []),
        (model(("delta_former",), window=512), 4096, []),
        (model(window=512, initial_tokens=1), 2048, ["model.rope_base = 10000: at 87 of"]),
        (model(window=512, separators="."), 2048, ["model.rope_base = 10000: at 87 of"]),
        (model(("gated_delta_net", "retention")), 4096, []),
        (model(rotary_fraction=0.5), 500, ["model.rope_base = 10000: at 6 of the distances up to 500, from 474 on"]),
        (model((Mixer("softmax_attention", rope_base=100.0), "softmax_attention")), 60, ["model.rope_base = 100: "]),
        (model((Mixer("softmax_attention", window=32), "delta_former")), 725, ["model.rope_base = 10000: at 1 of"]),
    ],
)
def test_which_layers_count(given, length, starts):
    found = beyond_bound(given, length)
    assert len(found) == len(starts) and all(map(str.startswith, found, starts)), found
