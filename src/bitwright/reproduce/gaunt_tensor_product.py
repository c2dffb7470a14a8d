"""System 20: Gaunt tensor products of equivariant features (arXiv 2401.10216)."""

from __future__ import annotations

from collections.abc import Callable
from math import log2

import torch

from bitwright.core.quantity import Evidence, Quantity
from bitwright.kernels.gaunt_tensor_product import BACKENDS, Degrees, gaunt_coefficients, gaunt_product, work
from bitwright.kernels.spherical_harmonics import count, spherical_harmonics
from bitwright.reproduce.claims import Claim

STATUS = "started"
ENTRY_POINTS = (
    "bitwright.kernels.gaunt_tensor_product.gaunt_product",
    "bitwright.kernels.gaunt_tensor_product.work",
    "bitwright.models.gaunt_layers.GauntProduct",
    "bitwright.models.gaunt_layers.GauntConvolution",
    "bitwright.models.gaunt_layers.ManyBody",
)
_PAPER = "arXiv 2401.10216"
_BOUND = 1e-11


def _feature(rows: int, degree: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, count(degree), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def largest_difference(backend: str) -> float:
    """Of a backend from the sum over all coefficients, relative to the largest value, degrees 0 to 10, float64."""
    worst = 0.0
    for left, right, out in ((0, 0, 0), (1, 1, 2), (3, 2, 4), (6, 6, 6), (10, 10, 10), (10, 4, 14), (5, 10, 3)):
        x, y = _feature(4, left, 0), _feature(4, right, 1)
        expected = torch.einsum("ri,rj,ijo->ro", x, y, gaunt_coefficients(Degrees(left, right, out)))
        made = gaunt_product(x, y, out, backend)  # type: ignore[arg-type]
        worst = max(worst, float((made - expected).abs().max() / expected.abs().max()))
    return worst


def rotation_error(backend: str) -> float:
    """Product of turned features from the turned product, relative, one random rotation with inversion."""
    matrix, _ = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64))
    turned = {}
    for degree in (4, 3, 6):
        points = torch.randn(400, 3, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
        before, after = (spherical_harmonics(degree, each) for each in (points, points @ matrix.T))
        turned[degree] = torch.linalg.lstsq(before, after).solution
    x, y = _feature(8, 4, 0), _feature(8, 3, 1)
    expected = gaunt_product(x, y, 6, backend) @ turned[6]  # type: ignore[arg-type]
    made = gaunt_product(x @ turned[4], y @ turned[3], 6, backend)  # type: ignore[arg-type]
    return float((made - expected).abs().max() / expected.abs().max())


def growth(backend: str, low: int = 16, high: int = 32) -> float:
    """Exponent of L in the counted operations of a product of degrees L, between two of them."""
    counts = [
        sum(work(Degrees(each, each, each), 1, backend).operations.values())  # type: ignore[arg-type]
        for each in (low, high)
    ]
    return log2(counts[1] / counts[0]) / log2(high / low)


def claims() -> tuple[Claim, ...]:
    """Exactness and equivariance of all backends, parity, and how work grows with the degree."""

    def exact(name: str, backend: str, measure: Callable[[str], float]) -> Claim:
        def found() -> Quantity:
            value = measure(backend)
            return Quantity(float(value > _BOUND), "", Evidence.EXECUTED, f"largest relative difference {value:.1g}")

        published = Quantity(0.0, "", Evidence.PUBLISHED, f"{_PAPER}: exact")
        return Claim(name, f"{backend}, float64", published, found, 0.0, f"0: below {_BOUND:g}.")

    def grows(backend: str, exponent: float, explanation: str = "", degrees: tuple[int, int] = (16, 32)) -> Claim:
        return Claim(
            "exponent of the degree in operations", f"{backend}, degrees {degrees[0]} to {degrees[1]}",
            Quantity(exponent, "", Evidence.PUBLISHED, f"{_PAPER}, abstract"),
            lambda: Quantity(growth(backend, *degrees), "", Evidence.PREDICTED, "counted operations"), 0.05,
            explanation, "lower",
        )  # fmt: skip

    def vector() -> Quantity:
        x, y = _feature(9, 1, 0), _feature(9, 1, 1)
        x[:, 0] = y[:, 0] = 0
        made = float(gaunt_product(x, y, 2)[:, 1:4].abs().max())
        return Quantity(float(made > 1e-12), "", Evidence.EXECUTED, f"largest component {made:.1g}")

    return (
        *(exact("products of two features", backend, largest_difference) for backend in BACKENDS),
        *(exact("rotations and inversions commute", backend, rotation_error) for backend in BACKENDS),
        Claim("vectors made of two vectors", "(1, 1) to 1: an odd sum of degrees",
              Quantity(0.0, "", Evidence.PUBLISHED, f"{_PAPER}: no antisymmetric paths"), vector, 0.0,
              "Cross products need Clebsch-Gordan paths; 0: below 1e-12."),
        grows("separable", 3.0), grows("fourier", 3.0),
        grows("grid", 3.0, "Dense products of harmonics and grid points are L^4, in fewer and larger steps: the "
                           "fastest on a CPU at degrees in use."),
        grows("direct", 6.0, "The sum over non-zero coefficients only: two of three orders decide the third.", (4, 8)),
    )  # fmt: skip
