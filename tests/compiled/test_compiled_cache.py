"""Programs for devices that are not here stay out of jax's cache of compiled programs."""

import jax
import numpy as np
import pytest
from support.training_cases import compile_once

from deltaformer_jax.training.ahead_of_time.topologies import without_cache


@pytest.fixture
def folder(tmp_path):
    yield from (tmp_path for _ in compile_once(tmp_path))


def test_without_cache(folder):
    def compile_one(scale):
        jax.jit(lambda x: np.float32(scale) * x).lower(np.ones(3, np.float32)).compile()

    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    with without_cache():
        compile_one(2)
    assert not [*folder.iterdir()]
    compile_one(3)
    assert [*folder.iterdir()]
