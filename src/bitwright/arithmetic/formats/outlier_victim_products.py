"""Products of outlier-victim pairs, from codes and from packed bytes, as the datapath makes them.

Source: arXiv 2304.07493 (ISCA 2023), section on the OliVe architecture.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.arithmetic.formats import base
from bitwright.arithmetic.formats.outlier_victim import OutlierVictimPairs
from bitwright.core.errors import InputError


def exponent_integer_matmul(
    a_format: OutlierVictimPairs, a: NDArray[Any], b_format: OutlierVictimPairs, b: NDArray[Any]
) -> NDArray[np.int64]:
    """Sums over k of products <e_a + e_b, i_a * i_b> of codes a (m, even k) and b (n, even k): int64 (m, n), exact.

    The multipliers see only the 4-bit integers; products that share an exponent are added before they are shifted.
    Raises InputError for other shapes, and as `OutlierVictimPairs.integers`.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise InputError(f"Codes (m, k) and (n, k) asked for; got {a.shape} and {b.shape}.")
    total = np.zeros((len(a), len(b)), np.int64)
    for e_a, i_a in a_format.exponent_integers(a):
        for e_b, i_b in b_format.exponent_integers(b):
            for one in np.unique(e_a):
                for two in np.unique(e_b):
                    products = base.exact_product(np.where(e_a == one, i_a, 0), np.where(e_b == two, i_b, 0))
                    total += products << int(one + two)
    return total


def packed_matmul(
    a_format: OutlierVictimPairs,
    a: NDArray[np.uint8],
    a_shape: tuple[int, int],
    b_format: OutlierVictimPairs,
    b: NDArray[np.uint8],
    b_shape: tuple[int, int],
) -> NDArray[np.float32]:
    """a (m, k) @ b (n, k)^T from packed bytes with scales per tensor or row, float32: integer sums, then the scales.

    Raises InputError for scales per group, and as `OutlierVictimPairs.unpack` and `exponent_integer_matmul`.
    """
    left, right = a_format.unpack(a, a_shape), b_format.unpack(b, b_shape)
    for item in (left, right):
        if item.scale.ndim and item.scale.shape[-1] != 1:
            raise InputError("A product of packed pairs takes scales per tensor or row; use formats.matmul for groups.")
    sums = exponent_integer_matmul(a_format, left.codes, b_format, right.codes)
    rows, columns = (item.scale.reshape(-1, 1) if item.scale.ndim else item.scale for item in (left, right))
    return (sums.astype(np.float64) * rows * columns.T).astype(np.float32)
