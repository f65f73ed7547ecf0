"""model.remat = "auto": the choice by the memory of the compiled step, and what is said of it."""

from types import SimpleNamespace

import jax
import pytest

from deltaformer_jax.config import Config, MeshConfig, ModelConfig
from deltaformer_jax.sharding.device_memory import agree_on_memory, planned_memory
from deltaformer_jax.sharding.mesh import make_mesh
from deltaformer_jax.training import memory
from deltaformer_jax.training.loss import logits_at_once
from deltaformer_jax.training.memory import ORDER, device_bytes, fitting_program, size_text, step_bytes

MESH = make_mesh(MeshConfig(), jax.devices()[:1])
NEEDS = dict(zip(ORDER, (100, 90, 80, 60, 40)))


class FakeProgram:
    """A Program whose compiled step needs NEEDS[remat] bytes: 10 of state, which is donated, and temporaries."""

    def __init__(self, config, mesh):
        self.remat = config.model.remat

    def lower_train_step(self, data):
        pass

    def compile_train_step(self, data):
        needs = NEEDS[self.remat]
        sizes = dict(argument_size_in_bytes=10, output_size_in_bytes=10, alias_size_in_bytes=10)
        analysis = None if needs is None else SimpleNamespace(**sizes, temp_size_in_bytes=needs - 10)
        return SimpleNamespace(memory_analysis=lambda: analysis)


def chosen(monkeypatch, limit, remat="auto"):
    monkeypatch.setattr(memory, "device_bytes", lambda mesh: limit)
    said = []
    program = fitting_program(Config(model=ModelConfig(remat=remat)), MESH, said.append, FakeProgram)
    return program.remat, said


@pytest.mark.parametrize(
    "limit, remat", [(1000, "none"), (106, "none"), (104, "operands"), (94, "products"), (84, "kernels"), (43, "block")]
)
def test_auto_takes_the_least_recomputation_that_fits(monkeypatch, limit, remat):
    name, said = chosen(monkeypatch, limit)
    assert name == remat
    assert said == [said[0]] and said[0].startswith(f"model.remat = auto: {remat}, of {limit} B of memory")
    assert f"{remat} needs {NEEDS[remat]} B" in said[0] and "none of them fits" not in said[0]


def test_auto_takes_block_where_nothing_fits_and_says_so(monkeypatch):
    name, said = chosen(monkeypatch, 30)
    assert name == "block" and said[0].endswith("block needs 40 B; none of them fits)")


def test_auto_goes_on_where_the_compiler_says_nothing(monkeypatch):
    monkeypatch.setitem(NEEDS, "none", None)
    name, said = chosen(monkeypatch, 1000)
    assert name == "operands" and "none needs an unknown amount" in said[0]


def test_auto_goes_on_where_the_compiler_refuses_a_program_that_does_not_fit(monkeypatch):
    compile_step = FakeProgram.compile_train_step

    def refuse(self, data):
        if self.remat in ("none", "operands", "products"):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom")
        return compile_step(self, data)

    monkeypatch.setattr(FakeProgram, "compile_train_step", refuse)
    name, said = chosen(monkeypatch, 1000)
    assert (
        name == "kernels"
        and "(none does not fit; operands does not fit; products does not fit; kernels needs 60 B)" in said[0]
    )
    other = jax.errors.JaxRuntimeError("INTERNAL: something else")
    monkeypatch.setattr(FakeProgram, "compile_train_step", lambda *_: (_ for _ in ()).throw(other))
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        chosen(monkeypatch, 1000)


def test_a_named_choice_is_not_compiled_for(monkeypatch):
    monkeypatch.setattr(FakeProgram, "compile_train_step", None)
    assert chosen(monkeypatch, 1, remat="kernels") == ("kernels", [])


def test_logits_at_once_grow_with_the_devices_memory():
    device = lambda limit: SimpleNamespace(memory_stats=lambda: limit and {"bytes_limit": limit})
    mesh = lambda *limits: SimpleNamespace(local_devices=[device(limit) for limit in limits])
    assert logits_at_once(MESH) == logits_at_once(mesh(None)) == logits_at_once(mesh(2**30)) == 2**26  # a CPU, 1 GiB
    assert logits_at_once(mesh(2**36, 2**37)) == 2**28  # the smaller of 64 and 128 GiB
    with planned_memory(2**35):  # of a device that is only compiled for; one that says what it has is asked
        assert logits_at_once(mesh(None)) == 2**27 and logits_at_once(mesh(2**36)) == 2**28
    assert logits_at_once(mesh(None)) == 2**26


def test_several_processes_choose_by_the_least_memory_of_all(monkeypatch):
    """Else they would compile different programs, and wait for one another in their collectives for ever."""
    mesh = SimpleNamespace(local_devices=[SimpleNamespace(memory_stats=lambda: {"bytes_limit": 2**37})])
    try:
        agree_on_memory([2**37, 2**36, None])
        assert logits_at_once(mesh) == 2**28
        agree_on_memory([None, None])
        assert logits_at_once(mesh) == 2**29
    finally:
        agree_on_memory([])
    monkeypatch.setattr(memory.common, "gather", lambda name, value: [value, 94])
    assert chosen(monkeypatch, 1000)[0] == "products"


def test_bytes_of_this_machine_and_of_a_step():
    assert 2**28 < device_bytes(MESH) < 2**50
    x = jax.ShapeDtypeStruct((256,), "float32")
    step = jax.jit(lambda x: x + 1, donate_argnums=0).lower(x).compile()
    assert step_bytes(step) == 1024 + step.memory_analysis().temp_size_in_bytes
    assert size_text(1536) == "1.5 KiB" and size_text(3 * 2**30) == "3.00 GiB"
