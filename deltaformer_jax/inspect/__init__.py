"""What a run has learnt, in numbers that can be read by themselves: the program `python -m deltaformer_jax.inspect`.

A program of the folder above that is run as a file, `python deltaformer_jax/train.py`, puts that folder first on
Python's path. `import inspect` then finds this package instead of Python's own module, and it gives way to that.
"""

import sys

if __name__ == "inspect":
    import importlib.util
    from importlib.machinery import PathFinder
    from pathlib import PurePath

    _folder = PurePath(__file__).parents[1]
    _spec = PathFinder.find_spec("inspect", [path for path in sys.path if PurePath(path) != _folder])
    sys.modules["inspect"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["inspect"])
