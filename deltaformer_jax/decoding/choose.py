"""Choosing the next token of each row from its logits."""

import jax
import jax.numpy as jnp


def choose(
    logits: jax.Array, keys: jax.Array, temperature: jax.Array, top_k: int, top_p: jax.Array | None = None
) -> jax.Array:
    """The next token of each row, int32 [B], from logits float32 [B, V] and one random key per row, keys [B].

    At temperature 0 it is the argmax. Otherwise it is drawn from softmax(logits / temperature), restricted first to the
    top_k largest logits (0: all), then to the smallest set of likeliest tokens whose probabilities sum to at least
    top_p (None: all). Tokens whose logit equals that of the last token kept are kept too. Nucleus sampling (top_p):
    Holtzman et al., arXiv 1904.09751.
    """
    scaled = logits / jnp.where(temperature > 0, temperature, 1.0)
    if top_k:
        kth = jax.lax.top_k(scaled, min(top_k, logits.shape[-1]))[0][:, -1:]
        scaled = jnp.where(scaled >= kth, scaled, -jnp.inf)
    if top_p is not None:
        falling = -jnp.sort(-scaled, axis=-1)
        shares = jax.nn.softmax(falling, axis=-1)
        before = jnp.cumsum(shares, axis=-1) - shares  # total probability of the likelier tokens
        least = jnp.min(jnp.where(before < top_p, falling, jnp.inf), axis=-1, keepdims=True)
        scaled = jnp.where(scaled >= least, scaled, -jnp.inf)
    drawn = jax.vmap(jax.random.categorical)(keys, scaled)
    return jnp.where(temperature > 0, drawn, jnp.argmax(logits, axis=-1)).astype(jnp.int32)


def power_of_two(length: int, least: int = 16) -> int:
    """The smallest power of two that is at least `length` and `least`: few of them serve all lengths."""
    return max(least, 1 << (int(length) - 1).bit_length())
