"""What set-ups share: traced and compiled once, and only what is asked for."""

import jax
import pytest
from support import training_cases as cases

from deltaformer_jax.config import DataConfig, MeshConfig
from deltaformer_jax.model import LanguageModel
from deltaformer_jax.model_parts import merge
from deltaformer_jax.sharding.mesh import make_mesh
from deltaformer_jax.training import program as programs
from deltaformer_jax.training.position import Position
from deltaformer_jax.training.program import Program


def new_program(**options):
    config = cases.small_config("", model__vocab_size=64)
    return Program(config, make_mesh(MeshConfig(), jax.devices()[:1]), **options)


def test_each_shape_of_a_batch_is_traced_and_compiled_once(monkeypatch):
    made = []
    original = programs.make_train_step
    monkeypatch.setattr(
        programs, "make_train_step", lambda *given, **named: made.append(1) or original(*given, **named)
    )
    program = new_program()
    assert not made  # shapes and shardings are known without a step
    short, long = (DataConfig(sequence_length=length, batch_size=2) for length in (8, 16))
    assert program.compile_train_step(short) is program.compile_train_step(short)
    assert program.lower_train_step(long) is program.lower_train_step(long) is not program.lower_train_step(short)
    task = DataConfig(path="task:parity", sequence_length=8, batch_size=2)
    assert program.lower_train_step(task) is not program.lower_train_step(short)
    assert made == [1]


def test_the_state_is_of_the_seed_and_as_was_said():
    program = new_program()
    state = program.create_state(1)
    cases.assert_same_bits(state, program.create_state(1))
    shapes = lambda tree: [(leaf.shape, leaf.dtype, leaf.sharding) for leaf in jax.tree.leaves(tree)]
    assert shapes(state) == shapes(program.abstract)


def test_a_model_of_ones_own():
    """What figure5 of reproduce does: another embedding in the model."""

    class Marked(LanguageModel):
        pass

    program = new_program(make_model=Marked)
    assert isinstance(merge(program.parts, program.parts.params), Marked)


@pytest.mark.parametrize("position", [Position(), Position(7, 9, (2, 5), (8,))])
def test_a_position_is_plain_json_and_back(position):
    record = position.as_record()
    assert Position.from_record({**record, "model": {}}) == position
    assert list(record) == ["step", "next_batch", "passed", "streak"] and isinstance(record["passed"], list)
