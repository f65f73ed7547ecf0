"""How every program reports an error of its input: one line on stderr and an exit code."""

import contextlib
import sys
from collections.abc import Iterator

from deltaformer_jax.host.called import install

_OURS = ("deltaformer_jax", "pallas_kernels")


@contextlib.contextmanager
def one_line_errors(
    program: str, kinds: tuple[type, ...] = (ValueError, OSError, NotImplementedError), code: int = 2
) -> Iterator[None]:
    """Turn errors of `kinds` into one line on stderr and exit code `code`; Ctrl-C gives code 130.

    Use it around a program's set-up, where these kinds of error are about the user's input. Around later code it would
    hide the traceback of a bug.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except kinds as error:
        print(f"{program}: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(code)
    except ImportError as error:
        if "gcsfs" in str(error):
            line = f"gs:// needs gcsfs: {install('gcs')}"
        elif isinstance(error, ModuleNotFoundError) and error.name and error.name.partition(".")[0] not in _OURS:
            line = f"this Python has no module {error.name}: install the package that has it, or this one again"
        else:
            raise
        print(f"{program}: error: {line}", file=sys.stderr)
        sys.exit(code)
    except KeyboardInterrupt:
        print(f"\n{program}: interrupted", file=sys.stderr)
        sys.exit(130)
