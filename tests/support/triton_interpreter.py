"""Runs descriptions of kernel launches (pallas_kernels/triton/launch.py) on the CPU, through Triton's interpreter.

Triton's interpreter must be chosen before Triton is first imported (TRITON_INTERPRET=1). So the tests start this file
as a separate program. For each request it reads a pickle from its standard input and writes one to its standard output.
Arrays are NumPy arrays.
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
    """The interpreter's executor, for arguments that are NumPy arrays in CPU memory instead of torch tensors."""

    def _init_args_hst(self, arguments, named):
        return arguments, named

    def _restore_args_dev(self, *_):
        pass


def _index_by_item(patch):
    """Works around NumPy 2.4, which refuses int() of an array of one number. Triton 3.6's interpreter needs that."""

    def patched(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    return patched


interpreter._patch_lang_tensor = _index_by_item(interpreter._patch_lang_tensor)


def _numbers(handle):
    """The numbers of an interpreter's tensor in float32. The interpreter stores bfloat16 as its bits."""
    if handle.dtype.scalar == tl.bfloat16:
        return handle.data.view(jnp.bfloat16).astype(np.float32)
    return handle.data.astype(np.float32)


def _to_tf32(x):
    """float32 rounded to the ten fraction bits of TF32."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    return ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)


def _halves(x):
    """float32 as two bfloat16 numbers whose sum approximates it: (large, small)."""
    large = x.astype(jnp.bfloat16).astype(np.float32)
    return large, (x - large).astype(jnp.bfloat16).astype(np.float32)


def _dot(self, a, b, d, input_precision, max_num_imprecise_acc):
    """A product as tensor cores compute it. The interpreter's own multiplies the bits of bfloat16 and ignores TF32."""
    left, right = _numbers(a), _numbers(b)
    if a.dtype.scalar == tl.float32 and input_precision == ir.INPUT_PRECISION.BF16x3:
        (left, little), (right, small) = _halves(left), _halves(right)
        corrections = np.matmul(little, right) + np.matmul(left, small)
        return interpreter.TensorHandle(np.matmul(left, right) + corrections + d.data, d.dtype.scalar)
    if a.dtype.scalar == tl.float32 and input_precision == ir.INPUT_PRECISION.TF32:
        left, right = _to_tf32(left), _to_tf32(right)
    return interpreter.TensorHandle(np.matmul(left, right) + d.data, d.dtype.scalar)


interpreter.InterpreterBuilder.create_dot = _dot
# Adds a precision that the compiler for NVIDIA accepts and the interpreter's list lacks.
interpreter.interpreter_builder.options = dataclasses.replace(
    interpreter.interpreter_builder.options, allowed_dot_input_precisions=("tf32", "tf32x3", "ieee", "bf16x3")
)

_cast = interpreter.InterpreterBuilder.cast_impl


def _cast_as_devices_do(self, src, dst_type):
    """Rounds float32 to the nearest bfloat16; the way back is exact. The interpreter's own cast truncates."""
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
    """The outputs of a launch. Unless it is zeroed, an output starts as NaN or, for integers, as a wrong number."""
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
    """`interpret` for a kernel given by module and name. outputs: tuples (shape, dtype, zeroed)."""
    kernel = getattr(importlib.import_module(module), name)
    outputs = tuple(Output(*x) for x in outputs)
    return interpret(Launch(kernel, tuple(arrays), outputs, tuple(scalars), grid, constants, 4, 1))


def forward_and_backward(settings, tiles, arrays, dout, du):
    """(out, u, gradients) of pallas_kernels.triton.delta.api. `arrays` are in the order of its arguments."""
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


def attention_forward_and_backward(scale, tiles, arrays, dout):
    """(out, gradients) of pallas_kernels.triton.attention. `arrays`: query, key, value, segment ids or None."""
    from pallas_kernels.triton import attention
    from pallas_kernels.triton.delta.table import Tile

    settings = attention.settings_of(scale, tiles=tuple((name, Tile(*sizes)) for name, sizes in tiles))
    query, key, value, segments = arrays
    out, residuals = attention.forward(settings, query, key, value, None, None, segments, run=interpret)
    gradients = attention.backward(settings, residuals, dout, run=interpret)
    return jax.tree.map(np.asarray, (out, gradients))


def gated_forward_and_backward(settings, arrays, dout, dstate):
    """(out, final state, gradients) of pallas_kernels.triton.gated.api. `arrays` are in the order of its arguments.

    settings: the fields of its Settings, with the tile as three numbers.
    """
    from pallas_kernels.triton.gated import api as gated
    from pallas_kernels.triton.gated.table import GatedTile

    settings = gated.Settings(*settings[:4], GatedTile(*settings[4]), *settings[5:])
    out, final, residuals = gated.forward(settings, *arrays, run=interpret)
    gradients = gated.backward(settings, residuals, dout, dstate, run=interpret)
    return jax.tree.map(np.asarray, (out, final, gradients))


def main():
    from support.triton_worker import receive, send

    # Redirect prints to stderr, so that they do not corrupt the answers on stdout.
    answers, sys.stdout = sys.stdout.buffer, sys.stderr
    while True:
        try:
            name, arguments = receive(sys.stdin.buffer)
        except EOFError:
            return
        send(answers, globals()[name](*arguments))


if __name__ == "__main__":
    main()
