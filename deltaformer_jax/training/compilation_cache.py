"""Compiled programs kept in a folder, so that a run that goes on compiles nothing it has compiled before."""

import jax
from etils import epath


def use_compilation_cache(folder: str) -> None:
    """Keep every program compiled from now on in `folder` (also gs://). "" leaves jax's own setting, which is
    JAX_COMPILATION_CACHE_DIR, as it is. Raises OSError, naming run.compilation_cache, if the folder can't be made."""
    if not folder:
        return
    try:
        epath.Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"run.compilation_cache = {folder!r}: cannot be made: {error}") from None
    jax.config.update("jax_compilation_cache_dir", folder)
    # jax keeps nothing small or quick by default: a restart would compile those programs again.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
