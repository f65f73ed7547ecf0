"""Who does what when: blocks of rows are handed out in an order in which nobody waits for work not yet begun.

A program draws a ticket when it starts. Tickets go through groups of heads, and within a group through the blocks, all
heads of the group at each: what a block needs of its head was drawn before, by a program that is running or has
finished, so that waiting for it ends. A group is as many heads as keep the machine busy while their keys and u stay in
the cache.

counters[0] is the next ticket, counters[1 + head] how many of a head's blocks are done; both start at 0.
"""

import triton
import triton.language as tl


@triton.jit
def draw(counters, HEADS: tl.constexpr, GROUP: tl.constexpr, blocks):
    """(head, how many of its blocks come before this one)."""
    ticket = tl.atomic_add(counters, 1, sem="relaxed")
    group = ticket // (GROUP * blocks)
    rest = ticket - group * GROUP * blocks
    size = tl.minimum(GROUP, HEADS - group * GROUP)
    return group * GROUP + rest % size, rest // size


@triton.jit
def done_blocks(counter):
    """How many blocks of the head are done; what they stored may be read afterwards."""
    return tl.atomic_add(counter, 0, sem="acquire")


@triton.jit
def wait_for(counter, number):
    """Returns when `number` blocks of the head are done."""
    while tl.atomic_add(counter, 0, sem="acquire") < number:
        pass


@triton.jit
def publish(counter, number):
    """This program's stores are done, and with them `number` blocks of the head."""
    tl.debug_barrier()
    tl.atomic_xchg(counter, number, sem="release")


@triton.jit
def afresh(n, start, counter):
    """The numbers n and start with a 0 added that the compiler cannot know: what is computed from them is computed once
    more.

    Addresses are cheap to compute and dear to keep: a part of a kernel that begins with this does not take over those
    of the parts before it, which would cost the registers of everything in between.
    """
    zero = tl.minimum(tl.load(counter), 0)
    return n + zero, start + zero
