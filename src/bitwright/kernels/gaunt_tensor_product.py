"""Equivariant products of features as products of functions on the sphere (Gaunt tensor products).

A feature (..., (l + 1)^2) are the coefficients of a function in real spherical harmonics (`spherical_harmonics`). The
product of two features is that of their functions, projected to degrees up to `degree_out`:

    out_o = sum over i, j of G_ijo x_i y_j,   G_ijo = integral of Y_i Y_j Y_o over the sphere

G is zero unless the degrees form a triangle and have an even sum, so that products that change sign under inversion
(cross products) do not exist. Four exact ways, all of torch operations, so that gradients of any order and
`torch.export` work:

    grid        values on a grid that integrates the product exactly: three real matrix products; the default
    separable   the same grid, polar angle and azimuth one after the other: O(L^3)
    fourier     the paper's: Fourier series on the torus, a convolution by FFT, closed-form projection: O(L^3)
    direct      the sum over all non-zero G: O(L^5)

Source: arXiv 2401.10216, sections 3.1 to 3.3 (Gaunt coefficients, change of basis, convolution); grids as in arXiv
2506.13523.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from math import pi, sqrt
from types import MappingProxyType
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from bitwright.core.errors import InputError, UnknownNameError
from bitwright.kernels.spherical_harmonics import count, degrees, polar_parts, sphere_grid, spherical_harmonics
from bitwright.kernels.work import Work

Backend = Literal["grid", "separable", "fourier", "direct"]
_TINY = 1e-12


@dataclass(frozen=True)
class Degrees:
    """Largest degrees of both operands and of the result. Raises InputError for a result beyond their sum."""

    left: int
    right: int
    out: int

    def __post_init__(self) -> None:
        for degree in (self.left, self.right, self.out):
            count(degree)
        if self.out > self.left + self.right:
            raise InputError(
                f"Degrees {self.left} and {self.right} make products of degrees up to {self.left + self.right}, not "
                f"{self.out}."
            )

    @property
    def grid(self) -> int:
        """Degree of what is integrated."""
        return self.left + self.right + self.out


def gaunt_coefficients(sizes: Degrees) -> Tensor:
    """G (left, right, out) in float64, exact quadrature; what is zero by the rules of triangle and parity is 0."""
    grid = sphere_grid(sizes.grid)
    points = grid.directions()
    harmonics = spherical_harmonics(max(sizes.left, sizes.right, sizes.out), points)
    left, right, out = (harmonics[:, : count(each)] for each in (sizes.left, sizes.right, sizes.out))
    found = torch.einsum("p,pi,pj,po->ijo", grid.point_weights(), left, right, out)
    i, j, o = (torch.from_numpy(degrees(each)) for each in (sizes.left, sizes.right, sizes.out))
    i, j, o = i[:, None, None], j[None, :, None], o[None, None]
    allowed = ((i - j).abs() <= o) & (o <= i + j) & ((i + j + o) % 2 == 0)
    return torch.where(allowed & (found.abs() > _TINY), found, 0.0)


@cache
def _constants(backend: str, sizes: Degrees, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """What a backend multiplies by, computed in float64 and kept in `dtype` (or the complex type of its size)."""
    kind = torch.complex64 if dtype == torch.float32 else torch.complex128
    made = _BUILDERS[backend](sizes)
    return tuple(each.to(kind) if each.is_complex() else each.to(dtype) if each.is_floating_point() else each
                 for each in made)  # fmt: skip


def _grid_constants(sizes: Degrees) -> tuple[Tensor, ...]:
    grid = sphere_grid(sizes.grid)
    harmonics = spherical_harmonics(max(sizes.left, sizes.right, sizes.out), grid.directions())
    back = harmonics[:, : count(sizes.out)] * grid.point_weights()[:, None]
    return harmonics[:, : count(sizes.left)].t(), harmonics[:, : count(sizes.right)].t(), back


def _grid_product(x: Tensor, y: Tensor, sizes: Degrees, constants: tuple[Tensor, ...]) -> Tensor:
    left, right, back = constants
    return ((x @ left) * (y @ right)) @ back


@cache
def _table_places(degree: int) -> Tensor:
    """Where (m, l) of a table (2 degree + 1, degree + 1) finds its coefficient; the number of them where |m| > l."""
    places = np.full((2 * degree + 1, degree + 1), count(degree))
    for at in range(degree + 1):
        for m in range(-at, at + 1):
            places[m + degree, at] = at * at + at + m
    return torch.from_numpy(places)


def _table(x: Tensor, degree: int) -> Tensor:
    """x (..., (degree + 1)^2) as (2 degree + 1, ..., degree + 1): orders first, zeros where |m| > l."""
    padded = torch.nn.functional.pad(x, (0, 1))
    return padded[..., _table_places(degree)].movedim(-2, 0)


def _from_table(table: Tensor, degree: int) -> Tensor:
    """The inverse of `_table`."""
    places = _table_places(degree).reshape(-1)
    order = torch.argsort(places, stable=True)[: count(degree)]
    return table.movedim(0, -2).flatten(-2)[..., order]


def _polar_table(degree: int, cosines: Tensor) -> Tensor:
    """Theta_l^|m| at every cosine, (2 degree + 1, degree + 1, cosines)."""
    ring = (1 - cosines * cosines).clamp_min(0).sqrt()
    found = torch.zeros(2 * degree + 1, degree + 1, len(cosines), dtype=torch.float64)
    for m, column in enumerate(polar_parts(degree, cosines)):
        for offset, polar in enumerate(column):
            found[degree + m, m + offset] = found[degree - m, m + offset] = polar * ring**m
    return found


def _azimuth_table(degree: int, angles: Tensor) -> Tensor:
    """sqrt(2) sin(|m| psi), 1, sqrt(2) cos(m psi) for m = -degree .. degree: (2 degree + 1, angles)."""
    m = torch.arange(-degree, degree + 1, dtype=torch.float64)[:, None]
    angles = angles[None]
    return torch.where(m > 0, sqrt(2) * (m * angles).cos(), torch.where(m < 0, sqrt(2) * (-m * angles).sin(), 1.0))


def _separable_constants(sizes: Degrees) -> tuple[Tensor, ...]:
    grid = sphere_grid(sizes.grid)
    cosines, angles = torch.from_numpy(grid.cosines), torch.from_numpy(grid.angles)
    found = []
    for degree in (sizes.left, sizes.right, sizes.out):
        found += [_polar_table(degree, cosines), _azimuth_table(degree, angles)]
    weights = torch.from_numpy(grid.weights) * (2 * pi / grid.azimuths)
    found[4] = (found[4] * weights).transpose(1, 2).contiguous()
    found[5] = found[5].t().contiguous()
    return tuple(found)


def _to_rings(x: Tensor, degree: int, polar: Tensor, azimuth: Tensor) -> Tensor:
    table = _table(x, degree)
    rings = torch.bmm(table.reshape(table.shape[0], -1, table.shape[-1]), polar)  # orders, rows, cosines
    return (rings.permute(1, 2, 0) @ azimuth).reshape(*x.shape[:-1], polar.shape[-1], azimuth.shape[-1])


def _separable_product(x: Tensor, y: Tensor, sizes: Degrees, constants: tuple[Tensor, ...]) -> Tensor:
    left = _to_rings(x, sizes.left, *constants[:2])
    values = left * _to_rings(y, sizes.right, *constants[2:4])
    polar, azimuth = constants[4:]
    orders = (values.reshape(-1, *values.shape[-2:]) @ azimuth).permute(2, 0, 1)  # orders, rows, cosines
    table = torch.bmm(orders, polar)
    return _from_table(table.reshape(table.shape[0], *values.shape[:-2], table.shape[-1]), sizes.out)


def _theta_series(degree: int) -> Tensor:
    """Fourier coefficients in theta, u = -degree .. degree, of Theta_l^m on the whole circle: complex (m, l, u), from
    an exact discrete transform: sin theta goes negative beyond pi, as it does in the polynomial of x, y and z."""
    size = 2 * degree + 1
    theta = 2 * pi * torch.arange(size, dtype=torch.float64) / size
    found = torch.zeros(degree + 1, degree + 1, size, dtype=torch.complex128)
    for m, column in enumerate(polar_parts(degree, theta.cos())):
        for offset, polar in enumerate(column):
            found[m, m + offset] = torch.fft.fftshift(torch.fft.fft(polar * theta.sin() ** m)) / size
    return found


def _fourier_constants(sizes: Degrees) -> tuple[Tensor, ...]:
    reach = sizes.left + sizes.right
    series = _theta_series(sizes.out)
    u, k = torch.arange(-reach, reach + 1)[:, None], torch.arange(-sizes.out, sizes.out + 1)[None]
    total = u + k
    even = (1 + (-1.0) ** total.double()) / torch.where(total.abs() == 1, 1.0, 1.0 - total.double() ** 2)
    # integral of e^(i n theta) sin theta over 0 .. pi
    integral = torch.where(total.abs() == 1, 1j * (pi / 2) * total.sign(), even.to(torch.complex128))
    back = torch.einsum("mlk,uk->mul", series, integral)  # orders, u, degrees
    return _theta_series(sizes.left), _theta_series(sizes.right), back


def _to_series(x: Tensor, degree: int, series: Tensor) -> Tensor:
    """Coefficients on the torus: complex (..., 2 degree + 1, 2 degree + 1) for u and v = -degree .. degree."""
    table = _table(x, degree)
    plus, minus = table[degree:], table[: degree + 1].flip(0)  # orders m and -m, m = 0 .. degree
    flat = torch.complex(plus, -minus).reshape(degree + 1, -1, degree + 1) * sqrt(0.5)
    forward = torch.bmm(flat, series)  # what belongs to e^(i m psi)
    backward = torch.bmm(flat.conj(), series)
    middle = torch.bmm(plus[:1].reshape(1, -1, degree + 1).to(series.dtype), series[:1])
    whole = torch.cat([backward[1:].flip(0), middle, forward[1:]])  # v, rows, u
    return whole.permute(1, 2, 0).reshape(*x.shape[:-1], 2 * degree + 1, 2 * degree + 1)


def _fourier_product(x: Tensor, y: Tensor, sizes: Degrees, constants: tuple[Tensor, ...]) -> Tensor:
    left, right = _to_series(x, sizes.left, constants[0]), _to_series(y, sizes.right, constants[1])
    size = 2 * (sizes.left + sizes.right) + 1
    spectrum = torch.fft.fft2(left, (size, size)) * torch.fft.fft2(right, (size, size))
    series = torch.fft.ifft2(spectrum)  # u and v from -(left + right)
    centre = sizes.left + sizes.right
    kept = series[..., centre - sizes.out : centre + sizes.out + 1].reshape(-1, size, 2 * sizes.out + 1)
    orders = kept.permute(2, 0, 1)  # v, rows, u
    positive, negative = orders[sizes.out :], orders[: sizes.out + 1].flip(0)
    projected = torch.bmm(torch.cat([positive, negative]), constants[2].repeat(2, 1, 1))
    one, other = projected.chunk(2)  # of v = m and v = -m
    cosines, sines = sqrt(2) * pi * (one + other).real, -sqrt(2) * pi * (one - other).imag
    table = torch.cat([sines[1:].flip(0), 2 * pi * one[:1].real, cosines[1:]])
    return _from_table(table.reshape(2 * sizes.out + 1, *series.shape[:-2], sizes.out + 1), sizes.out)


def _direct_constants(sizes: Degrees) -> tuple[Tensor, ...]:
    found = gaunt_coefficients(sizes)
    i, j, o = found.nonzero(as_tuple=True)
    return i, j, o, found[i, j, o]


def _direct_product(x: Tensor, y: Tensor, sizes: Degrees, constants: tuple[Tensor, ...]) -> Tensor:
    i, j, o, value = constants
    terms = x[..., i] * y[..., j] * value
    return terms.new_zeros(*terms.shape[:-1], count(sizes.out)).index_add(-1, o, terms)


_BUILDERS: Mapping[str, Callable[[Degrees], tuple[Tensor, ...]]] = MappingProxyType({
    "grid": _grid_constants, "separable": _separable_constants, "fourier": _fourier_constants,
    "direct": _direct_constants,
})  # fmt: skip
_PRODUCTS: Mapping[str, Callable[[Tensor, Tensor, Degrees, tuple[Tensor, ...]], Tensor]] = MappingProxyType({
    "grid": _grid_product, "separable": _separable_product, "fourier": _fourier_product, "direct": _direct_product,
})  # fmt: skip
BACKENDS = tuple(_BUILDERS)


def degree_of(x: Tensor, name: str = "Feature") -> int:
    """The largest degree of a feature (..., (l + 1)^2). Raises InputError for other sizes, types and devices."""
    if x.ndim < 1 or x.dtype not in (torch.float32, torch.float64):
        raise InputError(f"{name}: expected a float32 or float64 tensor (..., (l + 1)^2), not {x.dtype}.")
    degree = round(sqrt(x.shape[-1])) - 1
    if degree < 0 or count(degree) != x.shape[-1]:
        raise InputError(f"{name}: {x.shape[-1]} coefficients are not (l + 1)^2 for any degree l.")
    return degree


def gaunt_product(x: Tensor, y: Tensor, degree_out: int | None = None, backend: Backend = "grid") -> Tensor:
    """The product of two features (..., (l1 + 1)^2) and (..., (l2 + 1)^2), leading axes broadcast: (..., (degree_out +
    1)^2), by default as many degrees as the larger operand.

    Raises UnknownNameError for other backends; InputError for sizes that are no squares, complex or integer features,
    two types, leading axes that do not fit, and `degree_out` beyond l1 + l2.
    """
    if backend not in _PRODUCTS:
        raise UnknownNameError("backend of Gaunt products", backend, BACKENDS)
    left, right = degree_of(x, "Left feature"), degree_of(y, "Right feature")
    if x.dtype != y.dtype:
        raise InputError(f"Features of {x.dtype} and {y.dtype}; convert one of them.")
    axes = zip(reversed(x.shape[:-1]), reversed(y.shape[:-1]), strict=False)
    if any(one != other and 1 not in (one, other) for one, other in axes):
        raise InputError(f"Leading axes {tuple(x.shape[:-1])} and {tuple(y.shape[:-1])} do not fit.")
    sizes = Degrees(left, right, max(left, right) if degree_out is None else degree_out)
    constants = tuple(each.to(x.device) for each in _constants(backend, sizes, x.dtype))
    return _PRODUCTS[backend](x, y, sizes, constants)


def work(sizes: Degrees, rows: int, backend: Backend = "grid", itemsize: int = 4) -> Work:
    """Operations and bytes of `rows` products: those of the matrix products (8 per complex multiply-add), 5 n log2 n
    per complex FFT of n values, the products in between, and operands and results moved once."""
    if backend not in _PRODUCTS:
        raise UnknownNameError("backend of Gaunt products", backend, BACKENDS)
    left, right, out = (count(each) for each in (sizes.left, sizes.right, sizes.out))
    grid = sphere_grid(sizes.grid)
    rings, azimuths = len(grid.cosines), grid.azimuths
    if backend == "grid":
        operations = 2.0 * rings * azimuths * (left + right + out) + rings * azimuths
    elif backend == "separable":
        parts = (sizes.left, sizes.right, sizes.out)
        operations = sum(2.0 * (2 * part + 1) * rings * (part + 1 + azimuths) for part in parts) + rings * azimuths
    elif backend == "fourier":
        size = 2 * (sizes.left + sizes.right) + 1
        operations = sum(16.0 * (part + 1) ** 2 * (2 * part + 1) for part in (sizes.left, sizes.right))
        operations += 3 * 5.0 * size**2 * np.log2(size**2) + 6.0 * size**2 + 16.0 * (sizes.out + 1) ** 2 * size
    else:
        operations = 3.0 * int((gaunt_coefficients(sizes) != 0).sum())
    return Work({"matrix fp32": rows * operations}, {"memory": float(rows * itemsize * (left + right + out))})
