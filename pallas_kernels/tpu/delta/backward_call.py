"""The call of DeltaFormer's backward kernel on a TPU: its grid, inputs, outputs and scratch memory."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tpu import calls, limits
from pallas_kernels.tpu.delta.backward import backward_kernel
from pallas_kernels.tpu.delta.layout import Layout
from pallas_kernels.tpu.layout import Blocks


class Cotangents(NamedTuple):
    """The cotangents dU and dO as the kernel takes them.

    du [B Hu,T',V] float32. For a separate read: dout (dO) [B Hu,r,T',V] and, for softmax, row_dot (dO·o) [B Hu,r,T'].
    If tied: read_share (ρ dO) [B Hu,T',V] and read_dot (ρ dO·o) [B Hu,1,T'].
    """

    du: jax.Array
    dout: jax.Array | None = None
    row_dot: jax.Array | None = None
    read_share: jax.Array | None = None
    read_dot: jax.Array | None = None


def call_backward(settings, layout: Layout, w, query, k, value, alpha, beta, kept, cotangents: Cotangents):
    """The outputs {name: array [B Hu, ...]} of `backward_kernel`. Grid: (B Hu, chunks).

    w [.,T',K], k [B G,T',K]; `kept` are the forward kernel's outputs; the other arguments are the op's.
    """
    streamed = layout.streams_backward()
    return calls.call(
        functools.partial(backward_kernel, plan=layout.plan),
        "delta_backward",
        (layout.batch * layout.heads, layout.steps),
        layout.last,
        _inputs(layout, streamed, w, query, k, value, alpha, beta, kept, cotangents),
        _outputs(layout, streamed, alpha is not None, beta is not None),
        _scratch(layout, streamed),
        vmem_bytes=limits.VMEM_BYTES,
        interpret=settings.interpret,
    )


def _blocks(layout):
    """Blocks from the last chunk to the first."""
    return Blocks(layout, layout.chunk, lambda step: layout.steps - 1 - step)


def _inputs(layout, streamed, w, query, k, value, alpha, beta, kept, cotangents):
    plan, blocks = layout.plan, _blocks(layout)
    of_rows = (lambda x, of=None: None if x is None else calls.Input(x)) if streamed else blocks.whole
    q = layout.folded(query) if plan.reads else None
    return {
        "w": of_rows(w, plan.write_head),
        "q": of_rows(q),
        "dout": of_rows(cotangents.dout),
        "lse_write": blocks.whole(kept["lse_write"]) if plan.write.normalised else None,
        "lse_read": blocks.whole(kept["lse_read"]) if cotangents.row_dot is not None else None,
        "row_dot": blocks.whole(cotangents.row_dot),
        "segments": blocks.whole(layout.segments, plan.batch_row),
        "keys": blocks.tall(k, plan.kv_head),
        "own_w": blocks.tall(w, plan.write_head),
        "own_q": blocks.folded(q),
        "own_dout": blocks.folded(cotangents.dout),
        "u": blocks.tall(kept["u"]),
        "du": blocks.tall(cotangents.du),
        "summary": blocks.tall(kept["summary"]) if beta is not None else None,
        "v": blocks.tall(layout.tall(value), plan.kv_head),
        "read_share": blocks.tall(cotangents.read_share),
        "alpha": None if alpha is None else blocks.row(layout.row(alpha)),
        "beta": None if beta is None else blocks.row(layout.row(beta)),
        "read_dot": blocks.row(cotangents.read_dot),
    }


def _outputs(layout, streamed, has_alpha, has_beta):
    plan, blocks = layout.plan, _blocks(layout)
    heads, length, width, value_width = layout.batch * layout.heads, layout.length, layout.width, layout.value_width
    in_hbm = lambda *shape: calls.Output((heads, *shape), jnp.float32)
    grown = in_hbm if streamed else blocks.out_whole
    return {
        "dq": grown(layout.group, width, length) if plan.reads else None,
        "dw": grown(width, length),
        "adjoints": calls.Output((heads, length, value_width), plan.write_dtype) if streamed else None,
        "dk": blocks.out_tall(width, jnp.float32),
        "dv": blocks.out_tall(value_width, jnp.float32),
        "dalpha": blocks.out_row() if has_alpha else None,
        "dbeta": blocks.out_row() if has_beta else None,
    }


def _scratch(layout, streamed):
    plan, chunk, group = layout.plan, layout.chunk, layout.group
    width, value_width = layout.width, layout.value_width
    scratch = {
        "adjoint": pltpu.VMEM((chunk if streamed else layout.length, value_width), plan.write_dtype),
        "centre": pltpu.VMEM((1, layout.length), jnp.float32),
    }
    if not streamed:
        return scratch
    tiles = {
        "w": ((2, chunk, width), plan.operand),
        "adjoint": ((2, chunk, value_width), plan.write_dtype),
        "dw": ((2, width, chunk), jnp.float32),
    }
    if plan.reads:
        tiles |= {
            "q": ((2, group, chunk, width), plan.operand),
            "dout": ((2, group, chunk, value_width), plan.operand),
            "dq": ((2, group, width, chunk), jnp.float32),
        }
    scratch |= {f"{name}_tiles": pltpu.VMEM(*tile) for name, tile in tiles.items()}
    scratch |= {f"{name}_semaphores": pltpu.SemaphoreType.DMA((2, 2)) for name in tiles}
    return scratch | {"semaphore": pltpu.SemaphoreType.DMA(())}
