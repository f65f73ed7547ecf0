"""What is said of settings that are allowed but surprising."""

from deltaformer_jax.config.remarks.of_config import remarks

__all__ = ["remarks"]
