"""The order in which programs take blocks of rows, so that no program waits for a block that has not been started.

In the write, a block of a head needs the earlier blocks of the same head. A program therefore does not use its program
id, but draws a ticket when it starts. Tickets are ordered by group of heads, then by block, then by head of the group.
Every block that a block needs has a smaller ticket. Its program is running or has finished, so waiting for it ends. A
group has enough heads to occupy the GPU, and few enough that their keys and u stay in the L2 cache.

counters[0] is the next ticket. counters[1 + head] is the number of blocks of a head that are done. Both start at 0.
"""

import triton
import triton.language as tl


@triton.jit
def draw(counters, HEADS: tl.constexpr, GROUP: tl.constexpr, blocks):
    """(head, number of the head's blocks that come before this program's block)."""
    ticket = tl.atomic_add(counters, 1, sem="relaxed")
    group = ticket // (GROUP * blocks)
    rest = ticket - group * GROUP * blocks
    size = tl.minimum(GROUP, HEADS - group * GROUP)
    return group * GROUP + rest % size, rest // size


@triton.jit
def done_blocks(counter):
    """The number of blocks of the head that are done. After this call, the program may read what they stored."""
    return tl.atomic_add(counter, 0, sem="acquire")


@triton.jit
def wait_for(counter, number):
    """Waits until `number` blocks of the head are done."""
    while tl.atomic_add(counter, 0, sem="acquire") < number:
        pass


@triton.jit
def publish(counter, number):
    """Announces that `number` blocks of the head are done, after all stores of this program."""
    tl.debug_barrier()
    tl.atomic_xchg(counter, number, sem="release")


@triton.jit
def afresh(n, start, counter):
    """n and start, each plus a zero that the compiler cannot know to be zero.

    It makes the compiler compute addresses again in the next part of a kernel. Otherwise it would keep the addresses of
    the part before in registers, where they are missing for everything in between. Recomputing them is cheap.
    """
    zero = tl.minimum(tl.load(counter), 0)
    return n + zero, start + zero
