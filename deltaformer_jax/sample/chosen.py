"""Which entries the caches of a sample keep, from the flags --cache and --keep and those that go with them."""

from __future__ import annotations

import argparse

from deltaformer_jax.decoding import Evicted, Streaming

_ESCAPES = {"\\n": "\n", "\\t": "\t", "\\r": "\r"}


def chosen_entries(flags: argparse.Namespace) -> Streaming | Evicted | None:
    """The rule that the flags ask for, None for none. Raises ValueError, naming the flag."""
    of_keep = {name: getattr(flags, name) for name in ("proxy", "random", "write_weight", "by_head")}
    given = {name: value for name, value in of_keep.items() if value is not None}
    if flags.cache and flags.keep is not None:
        raise ValueError("--keep: with --cache entries are dropped all the time; give one or the other")
    if given and flags.keep is None:
        raise ValueError(f"--{next(iter(given))}: it goes with --keep SHARE; give both")
    if flags.separators is not None and not flags.cache:
        raise ValueError("--separators: they go with --cache INITIAL,SEPARATORS,WINDOW,CAPACITY; give both")
    if flags.all_places and not flags.cache:
        raise ValueError("--all_places: it goes with --cache INITIAL,SEPARATORS,WINDOW,CAPACITY; give both")
    try:
        if flags.keep is not None:
            return Evicted(flags.keep, **given)
        return _streaming(flags.cache, flags.separators, flags.all_places) if flags.cache else None
    except ValueError as error:
        raise ValueError(f"--{error}") from None


def _streaming(sizes: str, separators: str | None, all_places: bool) -> Streaming:
    try:
        initial, count, window, capacity = map(int, sizes.split(","))
    except ValueError:
        raise ValueError(
            f"cache {sizes}: give four whole numbers INITIAL,SEPARATORS,WINDOW,CAPACITY, such as 4,64,256,800"
        ) from None
    if separators is not None:
        if not separators:
            raise ValueError("separators: no character; leave it out for the usual ones")
        for escaped, character in _ESCAPES.items():
            separators = separators.replace(escaped, character)
    return Streaming(initial, count, window, capacity, separators, all_places=all_places)
