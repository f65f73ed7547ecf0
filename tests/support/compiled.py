"""What JAX traces, lowers and compiles while something runs."""

import contextlib

from jax import monitoring

# Every event by which JAX reports a trace, a lowering or a compilation begins so.
WORK = "/jax/core/compile/"


@contextlib.contextmanager
def counted():
    """The names of what was traced, lowered or compiled inside."""
    names = []
    listen = lambda name, seconds, **_: names.append(name) if name.startswith(WORK) else None
    monitoring.register_event_duration_secs_listener(listen)
    try:
        yield names
    finally:
        monitoring.unregister_event_duration_listener(listen)
