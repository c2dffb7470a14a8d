"""Outlier-victim pairs: the codec over all bytes, rounding against brute force, packed bytes, products."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from bitwright.arithmetic import formats
from bitwright.arithmetic.formats.outlier_victim import OutlierVictimPairs, pair_statistics
from bitwright.core.errors import InputError
from bitwright.engine.format_products import product_unit

OUTLIERS = {4: [12, 16, 24, 32, 48, 64, 96], 8: [m << e for e in range(2, 6) for m in range(32, 64)][1:]}


def scaled(x, **options):
    """Codes of x with a scale of 1."""
    form = OutlierVictimPairs(granularity="tensor", **options)
    return form, form.encode(np.asarray(x, np.float32), np.ones(1, np.float32))


def test_every_byte_has_one_meaning():
    form = OutlierVictimPairs(4)
    bytes_ = np.arange(256, dtype=np.uint8)
    pairs = np.stack([bytes_ & 15, bytes_ >> 4], axis=1)
    legal = ~(pairs == 8).all(axis=1)
    assert legal.sum() == 255
    values = form.integers(pairs[legal])
    signed = (pairs[legal].astype(int) ^ 8) - 8
    abfloat = {c: (2 + (c & 1)) * 2 ** (((c & 7) >> 1) + 2) * (-1 if c & 8 else 1) for c in range(16) if c & 7}
    for (a, b), (low, high), value in zip(pairs[legal], signed, values, strict=True):
        if b == 8:
            assert tuple(value) == (abfloat.get(a, 0), 0)
        elif a == 8:
            assert tuple(value) == (0, abfloat.get(b, 0))
        else:
            assert tuple(value) == (low, high)
    with pytest.raises(InputError, match="two victims"):
        form.integers(np.array([8, 8], np.uint8))


@pytest.mark.parametrize("bits", [4, 8])
def test_every_normal_pair_and_every_outlier_comes_back(bits):
    top = (1 << (bits - 1)) - 1
    normal = np.stack(np.meshgrid(np.arange(-top, top + 1), np.arange(-top, top + 1)), axis=-1).reshape(-1)
    form, encoded = scaled(normal, bits=bits)
    assert np.array_equal(form.decode(encoded), normal)
    big = np.array([sign * value for value in OUTLIERS[bits] for sign in (1, -1)])
    for pair in (np.stack([big, np.zeros_like(big)], 1), np.stack([np.zeros_like(big), big], 1)):
        form, encoded = scaled(pair.reshape(-1), bits=bits)
        assert np.array_equal(form.decode(encoded), pair.reshape(-1))
        packed = form.pack(encoded)
        assert packed.size == pair.size * bits // 8 + 4
        assert np.array_equal(form.decode(form.unpack(packed, pair.reshape(-1).shape)), pair.reshape(-1))


def brute_force(x, bits, keep):
    """Nearest value of both grids for each value; then the victims."""
    top = (1 << (bits - 1)) - 1
    grid = [*range(top + 1), *OUTLIERS[bits]]
    values = [min(grid, key=lambda g, v=v: (abs(g - abs(v)), g % 2 if g <= top else g)) for v in x]
    out = []
    for at in range(0, len(x), 2):
        (a, b), pair = (
            x[at : at + 2],
            [v if s >= 0 else -v for v, s in zip(values[at : at + 2], x[at : at + 2], strict=True)],
        )
        big = [values[at] > top, values[at + 1] > top]
        if all(big):
            right = abs(b) > abs(a) and keep == "larger"
            big = [not right, right]
        out += [0 if big[1] else pair[0], 0 if big[0] else pair[1]]
    return out


@settings(max_examples=200, deadline=None)
@given(arrays.arrays(np.float32, 24, elements=st.floats(-130, 130, width=32)), st.sampled_from(["larger", "left"]))
def test_rounding_against_brute_force(x, keep):
    form, encoded = scaled(x, bits=4, keep=keep)
    assert form.decode(encoded).tolist() == brute_force(x.astype(float).tolist(), 4, keep)


def test_ties():
    """Halfway between integers to even; halfway between 7 and 12, and between outliers, to the smaller."""
    form, encoded = scaled([0.5, 1.5, 2.5, -6.5, 9.5, 0, 14, 0, -20, 0, 9.6, 0])
    assert form.decode(encoded).tolist() == [0, 2, 2, -6, 7, 0, 12, 0, -16, 0, 12, 0]


def test_the_search_takes_the_best_candidate():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 64)).astype(np.float32)
    x[:, 5] = 9.0
    form = OutlierVictimPairs(4)
    scale = form.encode(x).scale[:, 0]
    for row, found in zip(x, scale, strict=True):
        sigma = abs(row.mean(dtype=np.float64)) + 3 * row.std(dtype=np.float64)
        errors = {}
        for percent in range(75, 250, 2):
            each = np.float32(sigma / 7 * percent / 100)
            values = np.array(brute_force((row / each).astype(float).tolist(), 4, "larger")) * each
            errors[each] = np.square(values - row).sum()
        assert found == pytest.approx(min(errors, key=errors.get), rel=1e-6)
    assert form.encode(np.zeros((1, 8), np.float32)).scale > 0


def test_outliers_cost_less_than_clipping_them():
    x = np.random.default_rng(1).standard_t(3, (16, 512)).astype(np.float32)
    assert formats.error_statistics(formats.parse("ovp4/row"), x).relative_mse < 0.75 * (
        formats.error_statistics(formats.parse("int4/row"), x).relative_mse
    )


def test_odd_tails_and_shapes():
    for shape in ((1,), (3, 7), (2, 3, 9)):
        x = np.random.default_rng(2).normal(size=shape).astype(np.float32)
        form = formats.parse("ovp4/row")
        packed = form.pack(form.encode(x))
        assert np.array_equal(form.decode(form.unpack(packed, shape)), form.decode(form.encode(x)))
        assert packed.size * 8 == pytest.approx(form.bits_per_element(shape) * x.size)


def test_exponent_integer_products_equal_integer_products():
    """The datapath on decoder words, K = 4,096 of outliers only: 27 bits of sums."""
    unit, form = product_unit("ovp4"), OutlierVictimPairs(4, "tensor")
    rng = np.random.default_rng(3)
    worst = np.tile([96.0, 0.0], 2048)[None]
    for a, b in ((rng.normal(0, 12, (5, 256)), rng.normal(0, 12, (6, 256))), (worst, worst)):
        one, two = (form.encode(x.astype(np.float32), np.ones(1, np.float32)) for x in (a, b))
        found = unit.matmul(form.operand_words(one), form.operand_words(two).T)
        expected = form.integers(one.codes) @ form.integers(two.codes).T
        assert np.array_equal(found, expected)
    assert expected[0, 0] == 2048 * 9216
    both = form.encode(np.full((1, 4096), 96.0, np.float32), np.ones(1, np.float32))
    assert int((form.integers(both.codes) ** 2).sum()).bit_length() + 1 <= 32


def test_pair_statistics():
    x = np.zeros(200, np.float32)
    x[[0, 10, 11]] = 100
    found = pair_statistics(x)
    assert (found.normal_normal, found.outlier_normal, found.outlier_outlier) == (98, 1, 1)
    assert found.largest_sigma == pytest.approx((100 - 1.5) / x.std(), rel=1e-4)


@pytest.mark.parametrize(
    "make",
    [lambda: OutlierVictimPairs(5), lambda: OutlierVictimPairs(4, 3), lambda: OutlierVictimPairs(4, "none"),
     lambda: OutlierVictimPairs(4, "row", "right"),  # type: ignore[arg-type]
     lambda: OutlierVictimPairs(4).encode(np.ones((2, 4), np.float32), np.zeros(2)),
     lambda: OutlierVictimPairs(8).operand_words(OutlierVictimPairs(8).encode(np.ones((2, 4), np.float32))),
     lambda: OutlierVictimPairs(4, "tensor").unpack(np.array([0x88, 0, 0, 0, 0], np.uint8), (2,))],
)  # fmt: skip
def test_bad_input(make):
    with pytest.raises(InputError):
        make()
