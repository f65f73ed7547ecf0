"""The models of other projects that can be read and written: a table for each of their model types."""

from deltaformer_jax.interop.sources import fla, transformers
from deltaformer_jax.interop.sources.base import Source

SOURCES: dict[str, Source] = {source.model_type: source for source in (*transformers.SOURCES, *fla.SOURCES)}

__all__ = ["SOURCES", "Source"]
