"""What the processes of a run tell one another through jax's coordinator: small values, errors, comparisons.

Every process must make the same calls in the same order; several threads may, if no two of them use the same name. The
values are JSON. Nothing here uses a device. With one process nothing is told, and jax is not needed.
"""

from __future__ import annotations

import collections
import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from deltaformer_jax.host import processes

Value = TypeVar("Value")

_FOREVER = 10 * 24 * 3600 * 1000  # milliseconds: whoever waits for a lost process is ended by the supervisor
_calls: collections.Counter[str] = collections.Counter()


def first(name: str, function: Callable[[], Value]) -> Value:
    """function() of process 0, for all. If it raises a ValueError or an OSError, all do, the others a ValueError."""
    if processes.count() == 1:
        return function()
    key = _key(name)
    if processes.index() > 0:
        told = _get(key)
        if "error" in told:
            raise ValueError(told["error"])
        return told["value"]
    try:
        value = function()
    except (ValueError, OSError) as error:
        _set(key, {"error": str(error)})
        raise
    _set(key, {"value": value})
    return value


def gather(name: str, value: Value) -> list[Value]:
    """The values of all processes, in their order. Process 0 collects them, so that each makes two calls."""
    count, key = processes.count(), f"{name}/gathered"
    if count == 1:
        return [value]
    parts = _key(name)
    if processes.index() > 0:
        _set(f"{parts}/{processes.index()}", value)
    return first(key, lambda: [value, *(_get(f"{parts}/{index}") for index in range(1, count))])


def check_same(name: str, mine: Mapping[str, Any], fix: str) -> None:
    """Raise ValueError in every process unless `mine` is the same in all; it names the first field that differs."""
    if processes.count() == 1:
        return
    theirs = first(name, lambda: dict(mine))
    own = json.loads(json.dumps(dict(mine)))
    differing = next((field for field in {**theirs, **own} if theirs.get(field) != own.get(field)), None)
    problem = differing and (
        f"{differing} = {own.get(differing)!r} in process {processes.index()}, {theirs.get(differing)!r} in process 0"
    )
    found = [problem for problem in gather(f"{name}/differing", problem) if problem]
    if found:
        others = f" (and {len(found) - 1} processes more differ from process 0)" if len(found) > 1 else ""
        raise ValueError(f"{found[0]}{others}; {fix}")


def tell_all(name: str, value: Any) -> None:
    """Process 0 tells `value`, once; `told` is what it told. Neither asks how many processes there are."""
    _set(f"deltaformer/{name}", value)


def told(name: str) -> Any:
    return _get(f"deltaformer/{name}")


def _key(name: str) -> str:
    _calls[name] += 1
    return f"deltaformer/{name}/{_calls[name]}"


def _client() -> Any:
    # jax offers no public way to its coordinator's store.
    from jax._src.distributed import global_state

    if global_state.client is None:
        raise RuntimeError("several processes without jax.distributed.initialize(): call it first")
    return global_state.client


def _set(key: str, value: Any) -> None:
    _client().key_value_set(key, json.dumps(value))


def _get(key: str) -> Any:
    return json.loads(_client().blocking_key_value_get(key, _FOREVER))
