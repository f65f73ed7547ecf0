"""A construction of up to d + d² nearly orthogonal unit vectors in d dimensions.

With m = log₂ d and vectors indexed by x in [0, d):

    basis 0         e_y
    basis 1 + c     d^(−1/2) (−1)^{c · x³ + y · x},      y = 0 … d − 1

In the exponent, · is the inner product of binary digits and x³ is the cube in the field of 2^m elements. Two vectors of
one basis are orthogonal. Between basis 0 and any other basis |k_i · k_j| = d^(−1/2). Between two bases 1 + c and
1 + c', the function x ↦ (c ⊕ c') · x³ decides: for odd m it is almost bent, and |k_i · k_j| is 0 or (2/d)^(1/2); for
even m, |k_i · k_j| is at most 2 d^(−1/2).

Source: the sequences of Gold, "Optimal binary sequences for spread spectrum multiplexing", 1967; Xu et al., DeltaFormer
(NeurIPS 2025), appendix B.1 asks for such keys.
"""

from __future__ import annotations

import numpy as np

# For m = 1, 2, …: irreducible polynomials over two elements, bit i the coefficient of z^i.
_IRREDUCIBLE = (0b11, 0b111, 0b1011, 0b10011, 0b100101, 0b1000011, 0b10000011, 0b100011011, 0b1000010001, 0b10000001001)


def near_orthogonal_keys(count: int, width: int) -> np.ndarray:
    """float64 [count, width]: the first `count` vectors of the construction above, each of length 1.

    Args: width: d, a power of two from 2 to 1024. count: 1 to d + d². Raises ValueError for other values.
    Cost: O(count · width).
    """
    m = max(width, 1).bit_length() - 1
    if width != 1 << m or not 1 <= m <= len(_IRREDUCIBLE):
        raise ValueError(f"width={width}: must be a power of two from 2 to {1 << len(_IRREDUCIBLE)}")
    if not 1 <= count <= width + width**2:
        raise ValueError(f"count={count}: must be 1 to width + width² = {width + width**2}")
    keys = np.zeros((count, width))
    alone = min(count, width)
    keys[np.arange(alone), np.arange(alone)] = 1.0
    c, y = np.divmod(np.arange(count - alone), width)
    x = np.arange(width)
    cube = field_product(field_product(x, x, m), x, m)
    odd = np.bitwise_count((c[:, None] & cube) ^ (y[:, None] & x)) % 2
    # The number of ones in a xor b has the parity of the sum of the numbers of ones in a and in b.
    keys[alone:] = (1.0 - 2.0 * odd) / np.sqrt(width)
    return keys


def coherence(keys: np.ndarray) -> float:
    """ε = max over i ≠ j of |k_i · k_j|; keys [n, d]."""
    products = np.abs(keys @ keys.T)
    np.fill_diagonal(products, 0.0)
    return float(products.max())


def field_product(a: np.ndarray, b: np.ndarray, m: int) -> np.ndarray:
    """int64 [N]: the elementwise products of a and b in the field of 2^m elements; a and b are int [N], below 2^m."""
    total = np.zeros_like(a)
    for bit in range(m):
        total = total ^ (a * ((b >> bit) & 1))
        a = a << 1
        a = a ^ (_IRREDUCIBLE[m - 1] * (a >> m))
    return total
