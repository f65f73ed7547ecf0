"""Bytes that devices send each other: a hand-made program whose figures are known, and programs compiled here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from deltaformer_jax.compiled.collectives import bytes_by_kind, collectives, in_layers

# A TPU's ways to write: groups named by axes of a mesh, a trip count in a loop's condition, a reduce-scatter as an
# all-reduce of which one fusion takes a slice, and an all-gather spread over two fusions as one chain.
GATHER = "replica_groups=mesh['x'=8] {'x'}, frontend_attributes={chain_id=\"0\"}, metadata={op_name=\"gather\"}"
PROGRAM = """HloModule jit_step

%scattered (p0: bf16[4096], p1: s32[]) -> bf16[512] {
  %p0 = bf16[4096]{0} parameter(0)
  %p1 = s32[] parameter(1)
  %sum = bf16[4096]{0} all-reduce(%p0), channel_id=1, replica_groups=mesh['x'=8] {'x'}, to_apply=%add
  ROOT %mine = bf16[512]{0} dynamic-slice(%sum, %p1), dynamic_slice_sizes={512}
}

%begun (p0: bf16[64]) -> bf16[512] {
  %p0 = bf16[64]{0} parameter(0)
  ROOT %g = bf16[512]{0} all-gather(%p0), channel_id=2, GATHER
}

%ended (p0: bf16[64]) -> bf16[512] {
  %p0 = bf16[64]{0} parameter(0)
  ROOT %g = bf16[512]{0} all-gather(%p0), channel_id=2, GATHER
}

%body (arg: (s32[], bf16[4096], bf16[64])) -> (s32[], bf16[4096], bf16[64]) {
  %arg = (s32[], bf16[4096], bf16[64]) parameter(0)
  %i = s32[] get-tuple-element(%arg), index=0
  %x = bf16[4096]{0} get-tuple-element(%arg), index=1
  %y = bf16[64]{0} get-tuple-element(%arg), index=2
  %part = bf16[512]{0} fusion(%x, %i), kind=kCustom, calls=%scattered
  %one = bf16[512]{0} fusion(%y), kind=kCustom, calls=%begun
  %two = bf16[512]{0} fusion(%y), kind=kCustom, calls=%ended
  ROOT %next = (s32[], bf16[4096], bf16[64]) tuple(%i, %x, %y)
}

%condition (arg: (s32[], bf16[4096], bf16[64])) -> pred[] {
  %limit = s32[] constant(6)
  %arg = (s32[], bf16[4096], bf16[64]) parameter(0)
  %i = s32[] get-tuple-element(%arg), index=0
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

ENTRY %main (x: bf16[4096], y: bf16[64], z: f32[1000]) -> f32[1000] {
  %x = bf16[4096]{0} parameter(0)
  %y = bf16[64]{0} parameter(1)
  %z = f32[1000]{0} parameter(2)
  %i = s32[] constant(0)
  %start = (s32[], bf16[4096], bf16[64]) tuple(%i, %x, %y)
  %loop = (s32[], bf16[4096], bf16[64]) while(%start), condition=%condition, body=%body, metadata={op_name="LAYERS"}
  %moved = f32[1000]{0} collective-permute(%z), channel_id=3, source_target_pairs={{0,1}}
  %swapped = f32[1000]{0} all-to-all(%moved), channel_id=4, replica_groups=[2,4]<=[8], dimensions={0}
  ROOT %all = f32[1000]{0} all-reduce(%swapped), channel_id=5, replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add
}
""".replace("GATHER", GATHER).replace("LAYERS", "jit(step)/jvp(jit(_hidden))/while")


def test_a_program_whose_figures_are_known():
    found = collectives(PROGRAM, 8)
    everyone = tuple(range(8))
    assert [(x.kind, x.members, x.turns) for x in found] == [
        ("reduce-scatter", everyone, 6),
        ("all-gather", everyone, 6),
        ("collective-permute", (0, 1), 1),
        ("all-to-all", (0, 1, 2, 3), 1),
        ("all-reduce", (0, 1), 1),
    ]
    total = bytes_by_kind(found)
    assert total["reduce-scatter"] == 6 * 8192 * 7 // 8
    assert total["all-gather"] == 6 * 128 * 7
    assert total["collective-permute"] == 4000
    assert total["all-to-all"] == 4000 * 3 // 4
    assert total["all-reduce"] == 4000  # 2 · 1/2 of it
    assert [x.kind for x in in_layers(found)] == ["reduce-scatter", "all-gather"]


def test_a_compiled_scan_counts_turns_and_groups():
    mesh = jax.make_mesh((2, 4), ("rows", "columns"), axis_types=(AxisType.Auto,) * 2)

    def body(x, w):
        return x + jax.lax.psum(w, "columns"), None

    def sums(w):
        x, _ = jax.lax.scan(body, w[0], w)
        return jax.lax.all_gather(x, "rows", tiled=True)

    spec = PartitionSpec()
    mapped = jax.shard_map(sums, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    text = jax.jit(mapped).lower(jnp.asarray(np.ones((5, 256), np.float32))).compile().as_text()
    total = bytes_by_kind(collectives(text, 8))
    assert total["all-reduce"] == 5 * 2 * 1024 * 3 // 4 and total["all-gather"] == 1024


@pytest.mark.parametrize(
    ("printed", "members"),
    [
        ("replica_groups={{0,2,4,6},{1,3,5,7}}", (0, 2, 4, 6)),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", (0, 4)),
        ("replica_groups=[2,4]<=[8]", (0, 1, 2, 3)),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", (0, 4)),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}", (0, 1, 2, 3)),
        ("replica_groups=mesh['a'=2,'b'=4] {'a','b'}", tuple(range(8))),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(1)2}", (0, 2)),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(2)2}", (0, 1)),
        ("source_target_pairs={{3,1},{1,3}}", (3, 1)),
        ("replica_groups={}", tuple(range(8))),
    ],
)
def test_the_devices_of_a_group(printed, members):
    text = PROGRAM.replace("source_target_pairs={{0,1}}", printed)
    (permuted,) = (x for x in collectives(text, 8) if x.kind == "collective-permute")
    assert permuted.members == members


@pytest.mark.parametrize(
    ("target", "kind", "written", "sent"),
    [
        ('"{1,2}x{0:3}"', "ALL_REDUCE", "all-reduce", 4000),
        ('"{1,2}x{0:3}"', "REDUCE_SCATTER", "reduce-scatter", 2000),
        ("{{100000,200000},{100001,200001}}", "ALL_TO_ALL", "all-to-all", 2000),
        ("{{100000->200000},{200000->100000}}", "ONE_TO_ONE", "collective-permute", 4000),
    ],
)
def test_collectives_between_slices(target, kind, written, sent):
    """A TPU's program hands them to the hosts, as a send and a receive; counted once, by their own kind."""
    text = """%moved = (f32[1000]{0}, u32[], token[]) send(%z, %i), channel_id=3, is_host_transfer=true, \
frontend_attributes={_xla_host_transfer_rendezvous="psum.7_0",_xla_megascale_target=TARGET,\
_xla_megascale_transfer_type="KIND"}
  %got = (f32[1000]{0}, u32[], token[]) recv(%i), channel_id=4, is_host_transfer=true, \
frontend_attributes={_xla_host_transfer_rendezvous="psum.7_0",_xla_megascale_target=TARGET,\
_xla_megascale_transfer_type="KIND"}"""
    text = text.replace("TARGET", target).replace("KIND", kind)
    old = "%moved = f32[1000]{0} collective-permute(%z), channel_id=3, source_target_pairs={{0,1}}"
    (found,) = [x for x in collectives(PROGRAM.replace(old, text), 8) if x.members == (0, 4)]
    assert (found.kind, found.operand, found.sent) == (written, 4000, sent)


def test_collectives_that_a_tpu7x_hands_to_its_sparse_cores():
    text = """HloModule jit_step

%gathered (p0: bf16[64]) -> bf16[512] {
  %p0 = bf16[64]{0} parameter(0)
  ROOT %all = bf16[512]{0} all-gather(%p0), channel_id=1, replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
}

%offloaded (p0: bf16[64]) -> bf16[512] {
  %p0 = bf16[64]{0} parameter(0)
  ROOT %call = bf16[512]{0} custom-call(%p0), custom_call_target="X", called_computations={%gathered}
}, execution_thread="sparsecore"

ENTRY %main (x: bf16[64]) -> bf16[512] {
  %x = bf16[64]{0} parameter(0)
  %begun = ((), (), (s32[8]{0:S(8)}, /*index=5*/s32[1]{0})) async-start(), calls=%offloaded
  %going = ((bf16[64]{0}), bf16[512]{0}, (s32[8]{0:S(8)})) async-update(%begun, %x)
  ROOT %got = bf16[512]{0} async-done(%going)
}
"""
    (found,) = collectives(text, 8)
    assert (found.kind, found.group, found.sent) == ("all-gather", 8, 128 * 7)


def test_text_that_is_no_program():
    with pytest.raises(ValueError, match="no ENTRY"):
        collectives("", 8)
