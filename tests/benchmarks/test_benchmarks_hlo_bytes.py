"""Bytes and FLOPs counted from HLO text: a hand-made program whose figures are known, and a compiled scan."""

import jax
import jax.numpy as jnp
import pytest
from training_step.hlo_bytes import launches

from deltaformer_jax.compiled.hlo import bytes_of, parse

# A loop of three turns over a stack f32[3,8,8]: 256 bytes a layer, 768 the stack.
PROGRAM = """HloModule jit_f, is_scheduled=true

%sliced (p0: f32[3,8,8], p1: s32[]) -> f32[8,8] {
  %p0 = f32[3,8,8]{2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %slice = f32[1,8,8]{2,1,0} dynamic-slice(%p0, %p1, %zero, %zero), dynamic_slice_sizes={1,8,8}
  ROOT %flat = f32[8,8]{1,0} bitcast(%slice)
}

%written (p0: f32[3,8,8], p1: s32[], p2: f32[8,8]) -> (f32[3,8,8], f32[8]) {
  %p0 = f32[3,8,8]{2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %p2 = f32[8,8]{1,0} parameter(2)
  %zero = s32[] constant(0)
  %layer = f32[1,8,8]{2,1,0} bitcast(%p2)
  %update = f32[3,8,8]{2,1,0} dynamic-update-slice(%p0, %layer, %p1, %zero, %zero)
  %sum = f32[8]{0} reduce(%p2, %zero), dimensions={1}, to_apply=%add
  ROOT %both = (f32[3,8,8]{2,1,0}, f32[8]{0}) tuple(%update, %sum), metadata={op_name="jit(f)/inner"}
}

%product (a: bf16[8,16], b: bf16[16,8]) -> f32[8,8] {
  %a = bf16[8,16]{1,0} parameter(0)
  %b = bf16[16,8]{1,0} parameter(1)
  ROOT %dot = f32[8,8]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%body (arg: (s32[], f32[3,8,8])) -> (s32[], f32[3,8,8]) {
  %arg = (s32[], f32[3,8,8]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%arg), index=0
  %stack = f32[3,8,8]{2,1,0} get-tuple-element(%arg), index=1
  %layer = f32[8,8]{1,0} fusion(%stack, %i), kind=kLoop, calls=%sliced, metadata={op_name="jit(f)/while/body/slice"}
  %kernel = (f32[8,8]{1,0}, bf16[1]{0}, /*index=2*/bf16[1]{0}) custom-call(%layer, %layer, /*index=2*/%layer)
  %made = f32[8,8]{1,0} get-tuple-element(%kernel), index=0
  %out = (f32[3,8,8]{2,1,0}, f32[8]{0}) fusion(%stack, %i, %made), kind=kInput, calls=%written
  %new = f32[3,8,8]{2,1,0} get-tuple-element(%out), index=0
  ROOT %next = (s32[], f32[3,8,8]{2,1,0}) tuple(%i, %new)
}

%condition (arg: (s32[], f32[3,8,8])) -> pred[] {
  %arg = (s32[], f32[3,8,8]{2,1,0}) parameter(0)
  ROOT %yes = pred[] constant(true)
}

ENTRY %main (x: bf16[8,16], y: bf16[16,8], stack: f32[3,8,8], rows: s32[2,1]) -> f32[3,8,8] {
  %x = bf16[8,16]{1,0} parameter(0)
  %y = bf16[16,8]{1,0} parameter(1)
  %stack = f32[3,8,8]{2,1,0} parameter(2)
  %rows = s32[2,1]{1,0} parameter(3)
  %gemm = f32[8,8]{1,0} fusion(%x, %y), kind=kCustom, calls=%product, metadata={op_name="jit(f)/x \\"y\\"/dot_general"}
  %blas = (f32[8,8]{1,0}, s8[64]{0}) custom-call(%x, %y), custom_call_target="__cublas$gemm", backend_config=GEMM
  %gathered = f32[2,8,8]{2,1,0} gather(%stack, %rows), offset_dims={1,2}, slice_sizes={1,8,8}
  %added = f32[3,8,8]{2,1,0} scatter(%stack, %rows, %gathered), to_apply=%add
  %zero = s32[] constant(0)
  %start = (s32[], f32[3,8,8]{2,1,0}) tuple(%zero, %added)
  %loop = (s32[], f32[3,8,8]{2,1,0}) while(%start), condition=%condition, body=%body, NAME, TRIPS
  ROOT %result = f32[3,8,8]{2,1,0} get-tuple-element(%loop), index=1
}
"""
for short, config in {
    "GEMM": '{"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}',
    "TRIPS": 'backend_config={"known_trip_count":{"n":"3"}}',
    "NAME": 'metadata={op_name="jit(f)/while"}',
}.items():
    PROGRAM = PROGRAM.replace(short, config)


def test_a_program_whose_figures_are_known():
    found, loops = launches(PROGRAM)
    figures = {x.name: (x.turns, x.bytes, x.flops) for x in found}
    assert figures == {
        "gemm": (1, 256 + 256 + 256, 2 * 8 * 8 * 16),
        "blas": (1, 256 + 256 + 256 + 64, 2 * 8 * 8 * 16),
        "gathered": (1, 2 * 512 + 8, 0),
        # The updates are read, and the rows that they are added to read and written.
        "added": (1, 3 * 512 + 8, 0),
        # One layer of the stack and its number; the layer.
        "layer": (3, 256 + 4 + 256, 0),
        # Its operand is passed three times and read once. It has three outputs.
        "kernel": (3, 256 + 256 + 2 * 2, 0),
        # Nothing of the stack is read: one layer is written into it in place. The layer is read, its sums written.
        "out": (3, 4 + 256 + 256 + 32, 0),
    }
    assert [x.name for x in found if x.kernel] == ["kernel"]
    assert [x.name for x in found if x.loop] == ["layer", "kernel", "out"]
    names = {x.name: x.op_name for x in found}
    assert names["gemm"] == 'jit(f)/x \\"y\\"/dot_general' and names["out"] == "jit(f)/inner" and names["added"] == ""
    assert loops == [("loop", "jit(f)/while", 3, True)]


def test_a_stack_that_is_read_whole_is_counted_whole():
    """A second reader inside the fusion wants all of the stack."""
    whole = PROGRAM.replace("reduce(%p2, %zero)", "reduce(%p0, %zero)")
    assert next(x.bytes for x in launches(whole)[0] if x.name == "out") == 768 + 4 + 256 + 256 + 32


def test_an_asynchronous_fusion_is_counted_where_it_starts():
    fusion = "%layer = f32[8,8]{1,0} fusion("
    start = "%start = ((f32[3,8,8]{2,1,0}, s32[]), f32[8,8]{1,0}, u32[]) fusion-start("
    lines = [line for line in PROGRAM.splitlines() if fusion in line]
    done = "  %layer = f32[8,8]{1,0} fusion-done(%start)"
    text = PROGRAM.replace(lines[0], f"{lines[0].replace(fusion, start)}\n{done}")
    assert {x.name: x.bytes for x in launches(text)[0] if x.loop} == {
        x.name if x.name != "layer" else "start": x.bytes for x in launches(PROGRAM)[0] if x.loop
    }


def test_the_turns_of_loops_inside_loops_multiply():
    """The layers' loop is put into another. A loop whose trip count the program does not say counts once."""
    outer = """
%outer (arg: (s32[], f32[3,8,8])) -> (s32[], f32[3,8,8]) {
  %arg = (s32[], f32[3,8,8]{2,1,0}) parameter(0)
  ROOT %loop.1 = (s32[], f32[3,8,8]{2,1,0}) while(%arg), condition=%condition, body=%body, TRIPS
}

ENTRY"""
    text = PROGRAM.replace("\nENTRY", outer.replace("TRIPS", 'backend_config={"known_trip_count":{"n":"5"}}'))
    text = text.replace("body=%body, metadata", "body=%outer, metadata")
    found, loops = launches(text)
    assert [(loop.name, loop.turns, loop.known) for loop in loops] == [("loop", 3, True), ("loop.1", 15, True)]
    assert {(x.turns, x.loop) for x in found if x.loop} == {(15, "loop.1")}
    _, loops = launches(text.replace('"known_trip_count":{"n":"3"}', ""))
    assert [(loop.turns, loop.known) for loop in loops] == [(1, False), (5, True)]


@pytest.mark.parametrize(
    "shape, size",
    [
        ("f32[2,3]{1,0}", 24),
        ("(bf16[4]{0}, pred[3]{0}, s32[])", 8 + 3 + 4),
        ("f8e4m3fn[16]{0:T(8,128)S(1)}", 16),
        ("c64[2]", 16),
        ("token[]", 0),
        ("u4[4]", 2),
    ],
)
def test_bytes_of_a_shape(shape, size):
    assert bytes_of(shape) == size


def test_text_without_an_entry():
    with pytest.raises(ValueError, match="no ENTRY"):
        parse("nothing")


def test_a_compiled_scan_counts_slices_and_turns():
    """x ← tanh(x W_l) over 8 stacked kernels, 256 KB each; the layers' outputs are stacked too."""
    layers, rows, width = 8, 32, 256

    def f(x, stack):
        def layer(x, w):
            x = jnp.tanh(x @ w)
            return x, x

        return jax.lax.scan(layer, x, stack)

    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((rows, width), (layers, width, width))]
    found, loops = launches(jax.jit(f).lower(*shapes).compile().as_text())
    assert [(loop.turns, loop.known) for loop in loops] == [(layers, True)]
    assert sum(x.turns * x.flops for x in found) == layers * 2 * rows * width * width
    turn = sum(x.bytes for x in found if x.loop)
    # A turn reads the layer's kernel, and at most copies it out of the stack first: read, written, read.
    kernel, activation = 4 * width * width, 4 * rows * width
    assert kernel < turn < 3 * kernel + 10 * activation < layers * kernel
