"""How every program says what is wrong: one line, and an exit code."""

import contextlib
import sys
from collections.abc import Iterator

from deltaformer_jax.host.called import install


@contextlib.contextmanager
def one_line_errors(
    program: str, kinds: tuple[type, ...] = (ValueError, OSError, NotImplementedError), code: int = 2
) -> Iterator[None]:
    """Turn an error that the user can mend into one line on stderr and an exit code. Around set-up, where these kinds
    speak of the user's input; further on they would hide a bug's traceback. Ctrl-C ends a program with code 130."""
    try:
        yield
    except BrokenPipeError:
        raise
    except kinds as error:
        print(f"{program}: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(code)
    except ImportError as error:
        if "gcsfs" not in str(error):
            raise
        print(f"{program}: error: gs:// needs gcsfs: {install('gcs')}", file=sys.stderr)
        sys.exit(code)
    except KeyboardInterrupt:
        print(f"\n{program}: interrupted", file=sys.stderr)
        sys.exit(130)
