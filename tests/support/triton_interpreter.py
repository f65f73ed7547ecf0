"""Runs descriptions of kernel launches (pallas_kernels/triton/launch.py) on the CPU, through Triton's interpreter.

The interpreter has to be chosen before Triton is first imported (TRITON_INTERPRET=1), so the tests start this file as a
program of its own; it reads one pickle from its standard input and writes one to its standard output. Arrays are
NumPy's.
"""

import dataclasses
import importlib
import os
import sys
import types

os.environ["TRITON_INTERPRET"] = "1"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime import interpreter

from pallas_kernels.triton.launch import Launch, Output, type_name


class _Executor(interpreter.GridExecutor):
    """The interpreter's own, for arguments that are in the CPU's memory already and no torch tensors."""

    def _init_args_hst(self, arguments, named):
        return arguments, named

    def _restore_args_dev(self, *_):
        pass


def _index_by_item(patch):
    """NumPy 2.4 refuses int() of an array of one number, which Triton 3.6's interpreter asks for."""

    def patched(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    return patched


interpreter._patch_lang_tensor = _index_by_item(interpreter._patch_lang_tensor)


def _numbers(handle):
    """The numbers of an interpreter's tensor in float32; it keeps bfloat16 as its bits."""
    if handle.dtype.scalar == tl.bfloat16:
        return handle.data.view(jnp.bfloat16).astype(np.float32)
    return handle.data.astype(np.float32)


def _to_tf32(x):
    """float32 rounded to TF32's ten bits of fraction."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    return ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)


def _halves(x):
    """float32 as the sum of two bfloat16 numbers, and what is left."""
    large = x.astype(jnp.bfloat16).astype(np.float32)
    return large, (x - large).astype(jnp.bfloat16).astype(np.float32)


def _dot(self, a, b, d, input_precision, max_num_imprecise_acc):
    """A product as the tensor cores make it: the interpreter's own multiplies bits of bfloat16, and ignores TF32."""
    left, right = _numbers(a), _numbers(b)
    if a.dtype.scalar == tl.float32 and input_precision == ir.INPUT_PRECISION.BF16x3:
        (left, little), (right, small) = _halves(left), _halves(right)
        corrections = np.matmul(little, right) + np.matmul(left, small)
        return interpreter.TensorHandle(np.matmul(left, right) + corrections + d.data, d.dtype.scalar)
    if a.dtype.scalar == tl.float32 and input_precision == ir.INPUT_PRECISION.TF32:
        left, right = _to_tf32(left), _to_tf32(right)
    return interpreter.TensorHandle(np.matmul(left, right) + d.data, d.dtype.scalar)


interpreter.InterpreterBuilder.create_dot = _dot
# The interpreter's list lacks what the compiler for NVIDIA takes.
interpreter.interpreter_builder.options = dataclasses.replace(
    interpreter.interpreter_builder.options, allowed_dot_input_precisions=("tf32", "tf32x3", "ieee", "bf16x3")
)

_cast = interpreter.InterpreterBuilder.cast_impl


def _cast_as_devices_do(self, src, dst_type):
    """float32 to bfloat16 rounds to the nearest, and back is exact: the interpreter's own cuts digits off."""
    types = (src.dtype.scalar, dst_type.scalar)
    if types == (tl.float32, tl.bfloat16):
        return interpreter.TensorHandle(src.data.astype(jnp.bfloat16).view(np.uint16), tl.bfloat16)
    if types == (tl.bfloat16, tl.float32):
        return interpreter.TensorHandle(_numbers(src), tl.float32)
    return _cast(self, src, dst_type)


interpreter.InterpreterBuilder.cast_impl = _cast_as_devices_do


def _pointer(array):
    return types.SimpleNamespace(data_ptr=lambda: array.ctypes.data, dtype=type_name(array.dtype))


def interpret(launch: Launch) -> list[np.ndarray]:
    """The launch's outputs. What it should fill itself starts as NaN, or as a number that is no answer."""
    arrays = [np.ascontiguousarray(x) for x in launch.arrays]
    outputs = []
    for output in launch.outputs:
        dtype = np.dtype(output.dtype)
        fill = 0 if output.zeroed else (-(10**6) if np.issubdtype(dtype, np.integer) else np.nan)
        outputs.append(np.full(output.shape, fill, dtype))
    scalars = [float(x) if isinstance(x, np.floating) else x for x in launch.scalars]
    kernel = launch.kernel
    _Executor(kernel.rewrite(), kernel.arg_names, (launch.grid,))(
        *map(_pointer, arrays), *scalars, *map(_pointer, outputs), **launch.constants
    )
    return outputs


def run_kernel(module, name, arrays, outputs, scalars, grid, constants):
    """`interpret` of a kernel given by its name; outputs are (shape, dtype, zeroed)."""
    kernel = getattr(importlib.import_module(module), name)
    outputs = tuple(Output(*x) for x in outputs)
    return interpret(Launch(kernel, tuple(arrays), outputs, tuple(scalars), grid, constants, 4, 1))


def forward_and_backward(settings, tiles, arrays, dout, du):
    """(out, u, gradients) of pallas_kernels.triton.delta.api; `arrays` in its order."""
    from pallas_kernels.triton.delta import api as delta
    from pallas_kernels.triton.delta.table import Tile

    write, read, tied = settings
    settings = delta.Settings(
        delta.Kappa(*write),
        None if read is None else delta.Kappa(*read),
        tied,
        tiles=tuple((name, Tile(*sizes)) for name, sizes in tiles),
    )
    out, u, residuals = delta.forward(settings, *arrays, run=interpret)
    gradients = delta.backward(settings, residuals, dout, du, run=interpret)
    return jax.tree.map(np.asarray, (out, u, gradients))


def gated_forward_and_backward(settings, arrays, dout, dstate):
    """(out, final state, gradients) of pallas_kernels.triton.gated.api; `arrays` in its order, `settings` its first
    five with the tile as three numbers."""
    from pallas_kernels.triton.gated import api as gated
    from pallas_kernels.triton.gated.table import GatedTile

    settings = gated.Settings(*settings[:4], GatedTile(*settings[4]))
    out, final, residuals = gated.forward(settings, *arrays, run=interpret)
    gradients = gated.backward(settings, residuals, dout, dstate, run=interpret)
    return jax.tree.map(np.asarray, (out, final, gradients))


def main():
    from support.triton_worker import receive, send

    # Whatever prints must not print into the answers.
    answers, sys.stdout = sys.stdout.buffer, sys.stderr
    while True:
        try:
            name, arguments = receive(sys.stdin.buffer)
        except EOFError:
            return
        send(answers, globals()[name](*arguments))


if __name__ == "__main__":
    main()
