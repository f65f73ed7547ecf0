"""State passing: the gated ops of one device on 2, 4 and 8 devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from context_cases import AXIS, DEVICES, LONG, compare, draw, mesh, packed
from jax.sharding import PartitionSpec

from deltaformer_jax import gated_delta_rule, gated_linear_attention, generalized_delta_rule
from deltaformer_jax.sharding.context.states import (
    gated_delta_rule_states,
    gated_linear_attention_states,
    generalized_delta_rule_states,
)

LENGTH = 48
FORMS = {gated_delta_rule: gated_delta_rule_states, gated_linear_attention: gated_linear_attention_states}


def inputs(op, decay, dtype, ids):
    sizes = dict(query=(2, 4), key=(2, 4), value=(4, 3))
    sizes |= {"erase_key": (2, 4)} if op is generalized_delta_rule else {}
    sizes |= {"log_decay": decay} if decay else {}
    sizes |= {"beta": (4,)} if op is gated_delta_rule else {}
    arrays = draw(sizes, LENGTH, dtype, ids=ids)
    arrays["key"] = arrays["key"] / jnp.linalg.norm(arrays["key"], axis=-1, keepdims=True)
    if decay:
        arrays["log_decay"] = -jnp.abs(arrays["log_decay"])
    if "beta" in arrays:
        arrays["beta"] = jax.nn.sigmoid(arrays["beta"])
    if op is generalized_delta_rule:
        arrays["erase_key"] = arrays["erase_key"] / jnp.linalg.norm(arrays["erase_key"], axis=-1, keepdims=True)
        arrays["erase_write"] = arrays["erase_key"] * 0.7
    # The state before the row's first segment.
    return arrays | {"initial_state": jnp.ones((2, 4, 4, 3), dtype)}


@pytest.mark.parametrize("op", FORMS)
@pytest.mark.parametrize("devices", DEVICES)
def test_packed_documents(op, devices):
    ids = packed(LENGTH)
    chunked = dict(implementation="chunked", chunk_size=4)
    form = lambda **arrays: FORMS[op](AXIS, **arrays, **chunked)[0]
    arrays = inputs(op, (4,), jnp.float32, ids)
    compare(form, lambda **arrays: op(**arrays, **chunked)[0], arrays, ids, devices, 1e-5)


def test_the_generalized_delta_rule_in_float64(x64):
    ids = packed(LENGTH)
    form = lambda **arrays: generalized_delta_rule_states(AXIS, **arrays, implementation="recurrent")[0]
    definition = lambda **arrays: generalized_delta_rule(**arrays, implementation="recurrent")[0]
    compare(form, definition, inputs(generalized_delta_rule, (4, 4), jnp.float64, ids), ids, 4, 1e-13)


@pytest.mark.parametrize("op", FORMS)
@pytest.mark.parametrize("decay", [pytest.param(None, marks=LONG), pytest.param((4,), marks=LONG), (4, 4)])
def test_the_definition_in_float64(x64, op, decay):
    for ids in (None, packed(LENGTH)):
        form = lambda **arrays: FORMS[op](AXIS, **arrays, implementation="recurrent")[0]
        definition = lambda **arrays: op(**arrays, implementation="recurrent")[0]
        compare(form, definition, inputs(op, decay, jnp.float64, ids), ids, 4, 1e-13)


@pytest.mark.parametrize("op", FORMS)
def test_the_final_state_is_on_every_device(op):
    ids = packed(LENGTH)
    arrays = inputs(op, (4,), jnp.float32, ids)
    specs = {name: PartitionSpec() if name == "initial_state" else PartitionSpec(None, AXIS) for name in arrays}
    form = functools.partial(FORMS[op], AXIS)
    last = jax.shard_map(
        lambda arrays, ids: form(**arrays, segment_ids=ids)[1][None],
        mesh=mesh(4),
        in_specs=(specs, PartitionSpec(None, AXIS)),
        out_specs=PartitionSpec(AXIS),
        check_vma=False,
    )(arrays, ids)
    expected = op(**arrays, segment_ids=ids)[1]
    np.testing.assert_allclose(last, np.broadcast_to(expected, last.shape), rtol=1e-5, atol=1e-5)


@pytest.mark.long
def test_one_number_as_decay():
    arrays = inputs(gated_linear_attention, None, jnp.float32, None)
    form = functools.partial(gated_linear_attention_states, AXIS, log_decay=-0.1)
    one = lambda **arrays: gated_linear_attention(**arrays, log_decay=-0.1)[0]
    compare(lambda **arrays: form(**arrays)[0], one, arrays, None, 4, 1e-5)
