"""Layers of equivariant networks whose products are Gaunt products: interaction, convolution, many-body.

Features are (..., channels, (l + 1)^2). Learnable weights are per channel and degree, on both operands and the result:
a path (l1, l2, l) has the weight w1(l1) w2(l2) w3(l), so that rotations commute with every layer. Source: arXiv
2401.10216, section 3.2 (weights) and 3.3 (the three classes of operations).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bitwright.core.errors import InputError
from bitwright.kernels.gaunt_tensor_product import Backend, Degrees, degree_of, gaunt_product
from bitwright.kernels.spherical_harmonics import count, degrees, sphere_grid, spherical_harmonics


class DegreeWeights(nn.Module):
    """Scales a feature (..., channels, (degree + 1)^2) by a weight per channel and degree, 1 at first."""

    places: Tensor

    def __init__(self, channels: int, degree: int) -> None:
        super().__init__()
        if channels < 1:
            raise InputError(f"Features have at least one channel, not {channels}.")
        self.weight = nn.Parameter(torch.ones(channels, degree + 1))
        self.register_buffer("places", torch.from_numpy(degrees(degree)), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """The same shape. Raises InputError for other channels or degrees."""
        if x.shape[-2:] != (len(self.weight), len(self.places)):
            raise InputError(f"Feature {tuple(x.shape)}: expected (..., {len(self.weight)}, {len(self.places)}).")
        return x * self.weight[:, self.places]


class GauntProduct(nn.Module):
    """Product of two features of degrees `left` and `right`, channel by channel: (..., channels, (out + 1)^2)."""

    def __init__(self, left: int, right: int, out: int, channels: int, backend: Backend = "grid") -> None:
        super().__init__()
        self.sizes, self.backend = Degrees(left, right, out), backend
        self.weights = nn.ModuleList(DegreeWeights(channels, degree) for degree in (left, right, out))
        for dtype in (torch.float32, torch.float64):  # constants are made now, not while `torch.export` traces
            gaunt_product(
                torch.zeros(1, count(left), dtype=dtype), torch.zeros(1, count(right), dtype=dtype), out, backend
            )

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x (..., channels, (left + 1)^2), y (..., channels, (right + 1)^2). Raises as `gaunt_product`."""
        made = gaunt_product(self.weights[0](x), self.weights[1](y), self.sizes.out, self.backend)
        weighted: Tensor = self.weights[2](made)
        return weighted


class GauntConvolution(nn.Module):
    """Product of features with the harmonics of a direction, as messages along the edges of a graph use it."""

    def __init__(self, degree: int, filter_degree: int, out: int, channels: int, backend: Backend = "grid") -> None:
        super().__init__()
        self.filter_degree = filter_degree
        self.product = GauntProduct(degree, filter_degree, out, channels, backend)

    def forward(self, x: Tensor, directions: Tensor, radial: Tensor | None = None) -> Tensor:
        """x (edges, channels, (degree + 1)^2), directions (edges, 3), `radial` (edges, channels): a factor of each."""
        harmonics = spherical_harmonics(self.filter_degree, directions)[:, None].to(x.dtype)
        around = harmonics.expand(-1, x.shape[-2], -1)
        made: Tensor = self.product(x, around if radial is None else around * radial[..., None])
        return made


class ManyBody(nn.Module):
    """Sum over orders 1 .. `order` of the feature times itself, weighted per order, kind, channel and degree.

    All orders are powers of the same values on one grid, each projected to degrees up to `out`.
    """

    points: Tensor
    back: Tensor

    def __init__(self, degree: int, order: int, out: int, channels: int, kinds: int = 1) -> None:
        super().__init__()
        count(degree), count(out)
        if order < 1 or channels < 1 or kinds < 1:
            raise InputError(f"Order {order}, {channels} channels, {kinds} kinds: expected at least 1 of each.")
        grid = sphere_grid(order * degree + out)
        directions = grid.directions()
        self.register_buffer("points", spherical_harmonics(degree, directions).t().contiguous(), persistent=False)
        back = spherical_harmonics(out, directions) * grid.point_weights()[:, None]
        self.register_buffer("back", back, persistent=False)
        self.register_buffer("places", torch.from_numpy(degrees(out)), persistent=False)
        self.weight = nn.Parameter(torch.ones(order, kinds, channels, out + 1) / order)

    def forward(self, x: Tensor, kind: Tensor | None = None) -> Tensor:
        """x (nodes, channels, (degree + 1)^2), `kind` (nodes,) whole numbers: (nodes, channels, (out + 1)^2)."""
        if x.ndim != 3 or count(degree_of(x)) != self.points.shape[0] or x.shape[1] != self.weight.shape[2]:
            raise InputError(
                f"Feature {tuple(x.shape)}: expected (nodes, {self.weight.shape[2]}, {self.points.shape[0]})."
            )
        kind = torch.zeros(len(x), dtype=torch.int64, device=x.device) if kind is None else kind
        values = x @ self.points.to(x.dtype)
        power, total = values, x.new_zeros(*x.shape[:-1], self.back.shape[1])
        for at, weight in enumerate(self.weight):
            power = power * values if at else power
            total = total + (power @ self.back.to(x.dtype)) * weight[kind][..., self.places].to(x.dtype)
        return total
