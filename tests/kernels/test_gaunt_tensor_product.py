"""Gaunt products against sympy's coefficients, scipy's harmonics, rotations, and sums over Clebsch-Gordan paths."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import sph_harm_y
from sympy.physics.wigner import real_gaunt

from bitwright.core.errors import InputError, UnknownNameError
from bitwright.kernels.gaunt_tensor_product import BACKENDS, Degrees, gaunt_coefficients, gaunt_product, work
from bitwright.kernels.spherical_harmonics import count, degrees, sphere_grid, spherical_harmonics
from bitwright.models.gaunt_layers import GauntConvolution, GauntProduct, ManyBody


def feature(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def rotation(seed: int, mirrored: bool = False) -> torch.Tensor:
    q, _ = torch.linalg.qr(feature(3, 3, seed=seed))
    q = q * torch.det(q).sign()
    return -q if mirrored else q


def representation(degree: int, matrix: torch.Tensor) -> torch.Tensor:
    """D with Y(R v) = D Y(v), from the harmonics of many directions."""
    points = feature(4 * count(degree), 3, seed=9)
    before, after = (spherical_harmonics(degree, each) for each in (points, points @ matrix.T))
    return torch.linalg.lstsq(before, after).solution.T


def test_harmonics_are_those_of_scipy() -> None:
    points = feature(50, 3)
    ours = spherical_harmonics(8, points).numpy()
    x, y, z = (points / points.norm(dim=-1, keepdim=True)).numpy().T
    theta, psi = np.arccos(z), np.arctan2(y, x)
    for degree in range(9):
        for m in range(-degree, degree + 1):
            value = sph_harm_y(degree, abs(m), theta, psi) * (-1) ** m  # without the Condon-Shortley phase
            real = value.real if m == 0 else np.sqrt(2) * (value.real if m > 0 else value.imag)
            assert np.allclose(ours[:, degree * degree + degree + m], real, atol=1e-12)


def test_the_grid_is_exact() -> None:
    for degree in (0, 1, 4, 9):
        grid = sphere_grid(2 * degree)
        harmonics = spherical_harmonics(degree, grid.directions())
        gram = harmonics.T @ (harmonics * grid.point_weights()[:, None])
        assert torch.allclose(gram, torch.eye(count(degree), dtype=torch.float64), atol=1e-12)


def test_coefficients_are_those_of_sympy() -> None:
    ours = gaunt_coefficients(Degrees(3, 3, 6)).numpy()
    rng = np.random.default_rng(0)
    pairs = [(degree, m) for degree in range(7) for m in range(-degree, degree + 1)]
    checked = 0
    for i, j, o in rng.integers(0, [16, 16, 49], (400, 3)):
        (a, ma), (b, mb), (c, mc) = pairs[i], pairs[j], pairs[o]
        if (a + b + c) % 2 or not abs(a - b) <= c <= a + b:
            assert ours[i, j, o] == 0
            continue
        # sympy's harmonics of odd orders have the other sign (Condon-Shortley)
        assert ours[i, j, o] == pytest.approx(
            float(real_gaunt(a, b, c, ma, mb, mc)) * (-1) ** (ma + mb + mc), abs=1e-12
        )
        checked += 1
    assert checked > 80


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 7), st.integers(0, 7), st.integers(0, 14), st.integers(0, 1000))
def test_all_backends_agree(left: int, right: int, out: int, seed: int) -> None:
    out = min(out, left + right)
    x, y = feature(3, 1, count(left), seed=seed), feature(1, 2, count(right), seed=seed + 1)
    expected = torch.einsum("...i,...j,ijo->...o", x, y, gaunt_coefficients(Degrees(left, right, out)))
    for backend in BACKENDS:
        made = gaunt_product(x, y, out, backend)
        assert made.shape == (3, 2, count(out))
        assert (made - expected).abs().max() <= 1e-12 * expected.abs().max().clamp_min(1e-12) * count(out)
        single = gaunt_product(x.float(), y.float(), out, backend)
        assert (single - expected).abs().max() <= 1e-5 * expected.abs().max().clamp_min(1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mirrored", [False, True])
def test_rotations_and_mirrors_commute(backend: str, mirrored: bool) -> None:
    matrix = rotation(5, mirrored)
    d4, d3, d6 = (representation(each, matrix) for each in (4, 3, 6))
    x, y = feature(5, 25), feature(5, 16, seed=1)
    turned = gaunt_product(x @ d4.T, y @ d3.T, 6, backend)
    assert torch.allclose(turned, gaunt_product(x, y, 6, backend) @ d6.T, atol=1e-10)


def test_there_is_no_cross_product() -> None:
    """Two vectors make no third one: the path (1, 1, 1) has an odd sum of degrees, and x o y is y o x."""
    x, y = feature(2, 4), feature(2, 4, seed=1)
    x[:, 0] = y[:, 0] = 0
    assert gaunt_product(x, y, 2)[:, 1:4].abs().max() < 1e-14
    assert torch.linalg.cross(x[:, 1:], y[:, 1:]).abs().max() > 0.1
    assert torch.allclose(gaunt_product(x, y, 2), gaunt_product(y, x, 2), atol=1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_two_orders(backend: str) -> None:
    x, y = feature(2, 9).requires_grad_(), feature(2, 4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: gaunt_product(a, b, 2, backend), (x, y))
    assert torch.autograd.gradgradcheck(lambda a, b: gaunt_product(a, b, 2, backend), (x, y))


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_can_be_exported(backend: str) -> None:
    layer = GauntProduct(3, 2, 3, 4, backend)
    x, y = feature(5, 4, 16).float(), feature(5, 4, 9, seed=1).float()
    exported = torch.export.export(layer, (x, y)).module()
    assert torch.allclose(exported(x, y), layer(x, y), atol=1e-6)


def test_weights_are_products_along_a_path() -> None:
    layer = GauntProduct(2, 3, 4, 2).double()
    for weights in layer.weights:
        torch.nn.init.normal_(weights.weight)
    x, y = feature(3, 2, 9), feature(3, 2, 16, seed=1)
    w1, w2, w3 = (each.weight for each in layer.weights)
    l1, l2, l3 = (torch.from_numpy(degrees(each)) for each in (2, 3, 4))
    path = w1[:, l1][:, :, None, None] * w2[:, l2][:, None, :, None] * w3[:, l3][:, None, None]
    expected = torch.einsum("nci,ncj,cijo->nco", x, y, gaunt_coefficients(Degrees(2, 3, 4)) * path)
    assert torch.allclose(layer(x, y), expected, atol=1e-12)


def test_convolution_turns_with_its_edges() -> None:
    matrix = rotation(3)
    layer = GauntConvolution(2, 3, 2, 4).double()
    x, edges, radial = feature(6, 4, 9), feature(6, 3, seed=1), feature(6, 4, seed=2)
    d = representation(2, matrix)
    assert torch.allclose(layer(x @ d.T, edges @ matrix.T, radial), layer(x, edges, radial) @ d.T, atol=1e-10)
    edges.requires_grad_()
    force = torch.autograd.grad(layer(x, edges).square().sum(), edges, create_graph=True)[0]
    assert torch.isfinite(torch.autograd.grad(force.square().sum(), edges)[0]).all()


def test_many_body_is_a_chain_of_products() -> None:
    layer = ManyBody(2, 3, 3, 2, kinds=2).double()
    torch.nn.init.normal_(layer.weight)
    x, kind = feature(4, 2, 9), torch.tensor([0, 1, 1, 0])
    square = gaunt_product(x, x, 4)
    chain = [torch.nn.functional.pad(x, (0, 7)), square[..., :16], gaunt_product(square, x, 3)]
    places = torch.from_numpy(degrees(3))
    expected = sum(part * layer.weight[at][kind][..., places] for at, part in enumerate(chain))
    assert torch.allclose(layer(x, kind), expected, atol=1e-12)
    turned = representation(2, rotation(4)), representation(3, rotation(4))
    assert torch.allclose(layer(x @ turned[0].T, kind), layer(x, kind) @ turned[1].T, atol=1e-10)


def test_counted_work_grows_as_the_paper_says() -> None:
    def exponent(backend: str) -> float:
        counts = [work(Degrees(each, each, each), 1, backend).operations["matrix fp32"] for each in (16, 32)]
        return float(np.log2(counts[1] / counts[0]))

    assert exponent("separable") < 3.1
    assert exponent("fourier") < 3.1
    assert 3.5 < exponent("grid") < 4.1
    direct = [int((gaunt_coefficients(Degrees(each, each, each)) != 0).sum()) for each in (4, 8)]
    assert np.log2(direct[1] / direct[0]) > 4
    assert work(Degrees(1, 1, 1), 7, "grid").traffic["memory"] == 7 * 4 * 12


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: gaunt_product(feature(2, 5), feature(2, 4)), InputError, "5 coefficients are not"),
        (lambda: gaunt_product(feature(2, 4), feature(2, 4), 3), InputError, "degrees up to 2, not 3"),
        (lambda: gaunt_product(feature(2, 4), feature(2, 4).float()), InputError, "convert one"),
        (lambda: gaunt_product(feature(2, 4).cfloat(), feature(2, 4)), InputError, "complex64"),
        (lambda: gaunt_product(feature(2, 4), feature(3, 4)), InputError, "do not fit"),
        (lambda: gaunt_product(feature(2, 4), feature(2, 4), 1, "fft"), UnknownNameError, "fft"),
        (lambda: gaunt_product(feature(2, 4), feature(2, 4), -1), InputError, "at least 0"),
        (lambda: spherical_harmonics(2, torch.zeros(3)), InputError, "not zero"),
        (lambda: spherical_harmonics(2, torch.full((2, 3), torch.nan)), InputError, "finite"),
        (lambda: spherical_harmonics(2, torch.ones(2, 4)), InputError, r"\(..., 3\)"),
        (lambda: ManyBody(2, 0, 1, 1), InputError, "at least 1"),
        (lambda: ManyBody(2, 2, 1, 3)(feature(2, 3, 4)), InputError, "expected"),
        (lambda: GauntProduct(1, 1, 1, 2)(feature(2, 3, 4), feature(2, 3, 4)), InputError, "expected"),
    ],
)
def test_bad_input_is_named(call, error, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=message):
        call()
