"""Records what JAX traces, lowers and compiles while a block runs."""

import contextlib

from jax import monitoring

# The prefix of all events by which JAX reports a trace, a lowering or a compilation.
WORK = "/jax/core/compile/"


@contextlib.contextmanager
def counted():
    """Yields a list that collects the event of each trace, lowering and compilation in the block."""
    names = []
    listen = lambda name, seconds, **_: names.append(name) if name.startswith(WORK) else None
    monitoring.register_event_duration_secs_listener(listen)
    try:
        yield names
    finally:
        monitoring.unregister_event_duration_listener(listen)
