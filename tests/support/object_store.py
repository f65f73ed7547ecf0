"""gs://bucket without a network: etils.epath's mock and a file system of fsspec, both redirected to a local folder."""

import contextlib
import os
from unittest import mock

from etils import epath
from etils.epath import testing
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import _registry

_ONE_PATH = ("exists", "isdir", "listdir", "glob", "makedirs", "mkdir", "remove", "rmtree", "stat")
_TWO_PATHS = ("rename", "replace")


@contextlib.contextmanager
def bucket(folder):
    """Inside the block gs://bucket is `folder`. Yields a list that collects the addresses opened, copied or read.

    Of a range that is read: (address, its first byte, the byte behind it).
    """
    opened: list = []

    def inside(path: epath.PathLike) -> str:
        return os.fspath(path).replace("gs://bucket", str(folder))

    def one(original, path, **options):
        return original(inside(path), **options)

    def two(original, path, target):
        return original(inside(path), inside(target))

    def open_file(original, path, mode):
        opened.append(os.fspath(path))
        return original(inside(path), mode)

    class Files(LocalFileSystem):
        protocol, cachable = "gs", False

        @classmethod
        def _strip_protocol(cls, path):
            return inside(path)

        def cat_file(self, path, start=None, end=None, **_):
            address = path.replace(str(folder), "gs://bucket")
            opened.append(address if start is None else (address, start, end))
            return super().cat_file(path, start, end)

        def get_file(self, path, target, **_):
            opened.append(path.replace(str(folder), "gs://bucket"))
            return super().get_file(path, target)

    mocked = testing.mock_epath(open=open_file, **dict.fromkeys(_ONE_PATH, one), **dict.fromkeys(_TWO_PATHS, two))
    with mock.patch.dict(_registry, gs=Files), mocked:
        yield opened
