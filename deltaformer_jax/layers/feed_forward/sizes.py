"""Hidden widths of feed-forward layers."""

from __future__ import annotations

GATED = ("swiglu", "geglu", "moe")


def check_width(mlp_dim: int) -> None:
    if mlp_dim < 1:
        raise ValueError(f"mlp_dim={mlp_dim} must be at least 1")


def hidden_width(given: int, d_model: int, name: str) -> int:
    """`given`, or for 0 8/3 d_model, rounded up to a multiple of 64, where there are three kernels, and 4 d_model where
    there are two: about as many parameters."""
    if given:
        return given
    return -(-8 * d_model // (3 * 64)) * 64 if name in GATED else 4 * d_model


def expert_width(given: int, dense: int, experts: int) -> int:
    """`given`, or for 0 the width of a dense layer divided by the experts of a token, up to a multiple of 8."""
    return given or -(-dense // (8 * experts)) * 8
