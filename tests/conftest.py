"""Eight simulated devices; warnings are errors (pyproject.toml)."""

import importlib.metadata
import os
import shutil
import signal
import tempfile

# A shell that starts the tests in the background has them ignore Ctrl-C, and the programs they start inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The README starts the tests by `uv run`; what a program says to type again depends on that, and a test says it itself.
os.environ.pop("UV_RUN_RECURSION_DEPTH", None)

# Before the first import of jax: tests run on the CPU wherever they run.
os.environ["JAX_PLATFORMS"] = "cpu"
# Tests compile much and run little. Without optimisation compiling takes half the time. XLA's own passes stay on.
os.environ["XLA_FLAGS"] = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true " + os.environ.get("XLA_FLAGS", "")
)
# The code generator that came before the fusion emitters takes a third of their time. jaxlib 0.12 does not have it any
# more, nor do the libtpu that go with it, and XLA aborts on a flag that it does not know. pip puts the newest libtpu
# beside an older jaxlib.
if importlib.metadata.version("jaxlib").startswith("0.10.") and all(
    libtpu.version.startswith("0.0.42") for libtpu in importlib.metadata.distributions(name="libtpu")
):
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"

# One cache of compiled programs for the whole session: the workers of xdist and the programs that tests start inherit
# it, and many tests compile the same step. The process that makes it removes it.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix=f"compiled-for-tests-{os.getpid()}-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import hypothesis
import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)

# The same examples every time: a failure in CI is a failure at home. No deadline, since a first example compiles.
hypothesis.settings.register_profile(
    "fixed", derandomize=True, deadline=None, max_examples=20, database=None, print_blob=True
)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))


def pytest_unconfigure():
    folder = os.environ["JAX_COMPILATION_CACHE_DIR"]
    if os.path.basename(folder).startswith(f"compiled-for-tests-{os.getpid()}-"):
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(autouse=True, scope="module")
def programs_are_let_go():
    """A worker that keeps every program it compiled ends with gigabytes of them."""
    yield
    jax.clear_caches()


@pytest.fixture(autouse=True)
def strict_arithmetic(request):
    """The ops' tests refuse silent broadcasts between ranks and silent changes of dtype."""
    if not request.module.__name__.startswith("test_ops_"):
        yield
        return
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        yield


# Beside those in ops/ and kernels/.
WITH_KERNELS = ("test_parallel_over_devices.py", "test_context_lowering.py")


@pytest.fixture(autouse=True)
def portable_forms(request, monkeypatch):
    """Where kernels are not the matter, an op that names none is traced in its portable form alone. Otherwise every
    trace would contain the kernels of all platforms, which takes several times as long and changes nothing on a CPU."""
    about_kernels = {"ops", "kernels"} & set(request.path.parts) or request.path.name in WITH_KERNELS
    if about_kernels:
        return
    from deltaformer_jax.ops.common import dispatch

    for backends in dispatch.BACKENDS.values():
        for name, backend in backends.items():
            absent = dispatch.Backend(backend.platform, backend.load, lambda: "not in this test")
            monkeypatch.setitem(backends, name, absent)


@pytest.fixture
def x64():
    """float64 for the definition and whatever is compared with it."""
    with jax.enable_x64(True):
        yield
