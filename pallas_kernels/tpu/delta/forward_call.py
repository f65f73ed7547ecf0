"""The call of DeltaFormer's forward kernel on a TPU: its grid, inputs, outputs and scratch memory."""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tpu import calls, limits
from pallas_kernels.tpu.delta.forward import forward_kernel
from pallas_kernels.tpu.delta.layout import Layout
from pallas_kernels.tpu.layout import Blocks


def call_forward(settings, layout: Layout, query, write_query, key, value, alpha, beta):
    """The outputs {name: array [B Hu, ...]} of `forward_kernel`. The arguments are the op's. Grid: (B Hu, chunks)."""
    plan = layout.plan
    kept_dtype = _kept_dtype(plan)
    streamed = layout.streams_forward(kept_dtype)
    return calls.call(
        functools.partial(forward_kernel, plan=plan),
        "delta_forward",
        (layout.batch * layout.heads, layout.steps),
        layout.first,
        _inputs(layout, streamed, query, write_query, key, value, alpha, beta),
        _outputs(layout, streamed, kept_dtype, value.dtype, beta is not None),
        _scratch(layout, streamed, kept_dtype),
        vmem_bytes=limits.VMEM_BYTES,
        interpret=settings.interpret,
    )


def _kept_dtype(plan):
    """The dtype in which u is kept for later chunks: the wider of the operand dtypes of write and read."""
    if not plan.reads:
        return plan.write_dtype
    return max(plan.write_dtype, plan.read_dtype, key=lambda dtype: dtype.itemsize)


def _inputs(layout, streamed, query, write_query, key, value, alpha, beta):
    plan, blocks = layout.plan, Blocks(layout, layout.chunk)
    k = layout.tall(key)
    return {
        "k": calls.Input(k) if streamed else blocks.whole(k, plan.kv_head),
        "keys": blocks.tall(k, plan.kv_head),
        "w": None if write_query is None or plan.tied else blocks.tall(layout.tall(write_query)),
        "q": blocks.folded(layout.folded(query)) if plan.reads or plan.tied else None,
        "v": blocks.tall(layout.tall(value), plan.kv_head),
        "alpha": None if alpha is None else blocks.row(layout.row(alpha)),
        "beta": None if beta is None else blocks.row(layout.row(beta)),
        "rows": blocks.row(layout.segments, plan.batch_row),
        "columns": blocks.whole(layout.segments, plan.batch_row),
    }


def _outputs(layout, streamed, kept_dtype, dtype, has_beta):
    """The kernel's outputs; `dtype` is that of out."""
    plan, blocks = layout.plan, Blocks(layout, layout.chunk)
    width, heads = layout.value_width, layout.batch * layout.heads
    return {
        "u_operand": calls.Output((heads, width, layout.length), kept_dtype) if streamed else None,
        "u": blocks.out_tall(width, jnp.float32),
        "out": blocks.out_folded(layout.group, width, dtype) if plan.reads or plan.tied else None,
        "summary": blocks.out_tall(width, plan.write_dtype) if plan.tied or has_beta else None,
        "lse_write": blocks.out_row() if plan.write.normalised else None,
        "lse_read": blocks.out_row(layout.group) if plan.reads and plan.read.normalised else None,
        "share": blocks.out_row() if plan.tied else None,
        "rest": blocks.out_row() if plan.tied else None,
    }


def _scratch(layout, streamed, kept_dtype):
    chunk, width = layout.chunk, layout.value_width
    scratch = {
        "values": pltpu.VMEM((width, chunk if streamed else layout.length), kept_dtype),
        "sums": pltpu.VMEM((width, chunk), jnp.float32),
    }
    if streamed:
        scratch |= {
            "k_tiles": pltpu.VMEM((2, chunk, layout.width), layout.plan.operand),
            "k_semaphores": pltpu.SemaphoreType.DMA((2, 2)),
            "u_tiles": pltpu.VMEM((2, width, chunk), kept_dtype),
            "u_semaphores": pltpu.SemaphoreType.DMA((2, 2)),
            "semaphore": pltpu.SemaphoreType.DMA(()),
        }
    return scratch
