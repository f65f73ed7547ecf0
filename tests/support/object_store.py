"""gs://bucket without a network: the mock of etils.epath, redirected to a local folder."""

import contextlib
import os

from etils import epath
from etils.epath import testing

_ONE_PATH = ("exists", "isdir", "listdir", "glob", "makedirs", "mkdir", "remove", "rmtree", "stat")
_TWO_PATHS = ("rename", "replace")


@contextlib.contextmanager
def bucket(folder):
    """Inside the block gs://bucket is `folder`. Yields a list that collects the addresses opened."""
    opened: list[str] = []

    def inside(path: epath.PathLike) -> str:
        return os.fspath(path).replace("gs://bucket", str(folder))

    def one(original, path, **options):
        return original(inside(path), **options)

    def two(original, path, target):
        return original(inside(path), inside(target))

    def open_file(original, path, mode):
        opened.append(os.fspath(path))
        return original(inside(path), mode)

    with testing.mock_epath(open=open_file, **dict.fromkeys(_ONE_PATH, one), **dict.fromkeys(_TWO_PATHS, two)):
        yield opened
