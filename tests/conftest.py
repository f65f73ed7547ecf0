"""Eight simulated devices; warnings are errors (pyproject.toml)."""

import os

# Before the first import of jax: tests run on the CPU wherever they run.
os.environ["JAX_PLATFORMS"] = "cpu"

import hypothesis
import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)

# The same examples every time: a failure in CI is a failure at home. No deadline, since a first example compiles.
hypothesis.settings.register_profile(
    "fixed", derandomize=True, deadline=None, max_examples=20, database=None, print_blob=True
)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))


@pytest.fixture
def x64():
    """float64 for the definition and whatever is compared with it."""
    with jax.enable_x64(True):
        yield
