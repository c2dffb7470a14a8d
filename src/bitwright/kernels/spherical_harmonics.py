"""Real orthonormal spherical harmonics, and grids on the sphere that integrate products of them exactly.

Degree l and order m = -l .. l stand at index l^2 + l + m; the polar axis is z, without the Condon-Shortley phase:

    Y_lm = Theta_l^|m|(z) * sqrt(2) cos(m psi), 1, sqrt(2) sin(|m| psi)   for m > 0, m = 0, m < 0

Theta_l^m contains (sin theta)^m. Everything is computed in float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import pi, sqrt

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bitwright.core.errors import InputError

Floats = NDArray[np.float64]


def count(degree: int) -> int:
    """Harmonics of degrees 0 .. `degree`. Raises InputError for a degree below 0 or no whole number."""
    if isinstance(degree, bool) or not isinstance(degree, int) or degree < 0:
        raise InputError(f"A degree of spherical harmonics is a whole number of at least 0, not {degree!r}.")
    return (degree + 1) ** 2


def degrees(degree: int) -> NDArray[np.int64]:
    """The degree l of every index, ((degree + 1)^2,)."""
    return np.repeat(np.arange(degree + 1), 2 * np.arange(degree + 1) + 1)


def polar_parts(degree: int, z: Tensor) -> list[list[Tensor]]:
    """Theta_l^m(z) / (sin theta)^m, polynomials in z of the shape of `z`, orthonormal on the sphere, by m and l - m.

    Three-term recurrence in l with normalised values, stable for any degree used here.
    """
    found: list[list[Tensor]] = []
    start = torch.full_like(z, sqrt(1 / (4 * pi)))
    for m in range(degree + 1):
        if m:
            start = start * sqrt((2 * m + 1) / (2 * m))
        column = [start]
        for at in range(m + 1, degree + 1):
            a = sqrt((4 * at * at - 1) / (at * at - m * m))
            value = a * z * column[-1]
            if at > m + 1:
                before = at - 1
                value = value - a * sqrt((before * before - m * m) / (4 * before * before - 1)) * column[-2]
            column.append(value)
        found.append(column)
    return found


def spherical_harmonics(degree: int, directions: Tensor) -> Tensor:
    """Y_lm of directions (..., 3), which are normalised: (..., (degree + 1)^2), differentiable.

    Raises InputError for other shapes, vectors without a direction, and values that are not finite.
    """
    size = count(degree)
    if directions.ndim < 1 or directions.shape[-1] != 3 or not directions.is_floating_point():
        raise InputError(f"Directions are real tensors (..., 3), not {directions.dtype} {tuple(directions.shape)}.")
    length = directions.norm(dim=-1, keepdim=True)
    if not bool((torch.isfinite(length) & (length > 0)).all()):
        raise InputError("A direction is a finite vector that is not zero.")
    x, y, z = (directions / length).unbind(-1)
    cosine, sine = [torch.ones_like(x)], [torch.zeros_like(x)]  # (sin theta)^m times those of m psi
    for _ in range(degree):
        cosine.append(x * cosine[-1] - y * sine[-1])
        sine.append(x * sine[-1] + y * cosine[-2])
    found: list[Tensor | None] = [None] * size
    for m, column in enumerate(polar_parts(degree, z)):
        for offset, polar in enumerate(column):
            at = m + offset
            place = at * at + at
            found[place + m] = polar * cosine[m] * (sqrt(2) if m else 1.0)
            if m:
                found[place - m] = polar * sine[m] * sqrt(2)
    return torch.stack([each for each in found if each is not None], -1)


@dataclass(frozen=True)
class SphereGrid:
    """Gauss-Legendre nodes in cos theta times equally spaced angles: directions (polar * azimuths, 3), weights of the
    same number, which integrate every polynomial up to the grid's degree exactly."""

    cosines: Floats
    weights: Floats
    azimuths: int

    @property
    def angles(self) -> Floats:
        """The azimuths psi."""
        return 2 * pi * np.arange(self.azimuths) / self.azimuths

    def directions(self) -> Tensor:
        """(polar * azimuths, 3), azimuths fastest."""
        z, psi = torch.from_numpy(self.cosines)[:, None], torch.from_numpy(self.angles)[None]
        ring = (1 - z * z).sqrt()
        return torch.stack([ring * psi.cos(), ring * psi.sin(), z.expand(-1, self.azimuths)], -1).reshape(-1, 3)

    def point_weights(self) -> Tensor:
        """(polar * azimuths,)."""
        ring = torch.from_numpy(self.weights) * (2 * pi / self.azimuths)
        return ring[:, None].expand(-1, self.azimuths).reshape(-1)


@cache
def sphere_grid(degree: int) -> SphereGrid:
    """The grid that integrates polynomials of up to `degree`: degree // 2 + 1 nodes, degree + 1 azimuths."""
    count(degree)
    nodes, weights = np.polynomial.legendre.leggauss(degree // 2 + 1)
    return SphereGrid(nodes, weights, degree + 1)
