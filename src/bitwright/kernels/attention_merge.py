"""Attention over parts of the keys, put together exactly.

A part gives its normalised output O and L, the logarithm of its sum of exponentials; then L = ln sum exp(L_s) and
O = sum exp(L_s - L) O_s, in any order and for parts of any size. A part without keys is O = 0, L = -inf.

Source: arXiv 2405.10480 (associativity of the rescaled softmax); arXiv 2307.08691, section 2.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from bitwright.core.errors import InputError


def merge(partials: Sequence[tuple[Any, Any]]) -> tuple[Any, Any]:
    """The output (..., channels) and L (...) of all parts, from those of each: numpy arrays or torch tensors of one
    shape (torch's with gradients), in float32 at least inside and in the type given outside.

    Raises InputError where there is no part, or shapes differ.
    """
    import torch

    if not partials:
        raise InputError("No partial results were given; merge needs at least one.")
    shapes = [(tuple(out.shape), tuple(lse.shape)) for out, lse in partials]
    if any(shape != shapes[0] for shape in shapes) or shapes[0][0][:-1] != shapes[0][1]:
        raise InputError(f"Partial results are outputs (..., channels) and sums (...) of one shape, not {shapes}.")
    if isinstance(partials[0][0], np.ndarray):
        out, lse = merge([(torch.from_numpy(out), torch.from_numpy(lse)) for out, lse in partials])
        return out.numpy(), lse.numpy()
    kind, kind_lse = partials[0][0].dtype, partials[0][1].dtype
    wide = torch.promote_types(torch.promote_types(kind, kind_lse), torch.float32)
    sums = torch.stack([lse.to(wide) for _, lse in partials])
    total = torch.logsumexp(sums, 0)
    none = total == -torch.inf
    weights = (sums - total.masked_fill(none, 0.0)).exp()[..., None]
    merged = (weights * torch.stack([out.to(wide) for out, _ in partials])).sum(0)
    return merged.to(kind), total.to(kind_lse)
