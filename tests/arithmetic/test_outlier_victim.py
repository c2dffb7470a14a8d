"""Outlier-victim pairs: the codec over all bytes, rounding against brute force, packed bytes, products."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from bitwright.arithmetic import formats
from bitwright.arithmetic.formats.outlier_victim import (
    OutlierVictimPairs,
    adaptive_pairs,
    clipping_search,
    pair_statistics,
)
from bitwright.arithmetic.formats.outlier_victim_products import exponent_integer_matmul, packed_matmul
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


GRIDS = {  # options -> normal magnitudes, outliers, worked out by hand
    (): ([*range(8)], OUTLIERS[4]),
    (("normal", "flint"),): ([0, 1, 2, 3, 4, 6, 8, 16], [24, 32, 48, 64, 96, 128, 192]),
    (("bias", 3),): ([*range(8)], [24, 32, 48, 64, 96, 128, 192]),
    (("exponent_bits", 1),): ([*range(8)], [10, 12, 14, 16, 20, 24, 28]),
    (("bits", 8),): ([*range(128)], OUTLIERS[8]),
    (("signed", False),): ([*range(15)], [m << e for e in range(2, 6) for m in range(4, 8)][1:-1]),
    (("bits", 8), ("signed", False)): ([*range(255)], [m << e for e in range(2, 6) for m in range(64, 128)][1:-1]),
    (("bits", 8), ("exponent_bits", 4)): (
        [*range(128)],
        [m << e for e in range(4, 13) for m in range(8, 16) if 128 < m << e <= 32768],
    ),
}


def brute_force(x, bits, keep, grids=None):
    """Nearest value of both grids for each value; then the victims."""
    normal, outliers = grids or GRIDS[(("bits", 8),) if bits == 8 else ()]
    top = normal[-1]
    even = normal == [*range(top + 1)]
    grid = [*normal, *outliers]
    values = [min(grid, key=lambda g, v=v: (abs(g - abs(v)), g % 2 if g <= top and even else g)) for v in x]
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


@pytest.mark.parametrize("options", GRIDS, ids=str)
@pytest.mark.parametrize("keep", ["larger", "left"])
def test_every_grid_against_brute_force(options, keep):
    """Planted outliers of many sizes, pairs of two of them, every value of the grid and every tie between two."""
    normal, outliers = GRIDS[options]
    form = OutlierVictimPairs(granularity="tensor", keep=keep, **dict(options))
    assert sorted({abs(v) for v in form.outliers.tolist()} - {0})[: len(outliers)] == outliers
    assert form.largest == outliers[-1]
    rng = np.random.default_rng(5)
    grid = np.array([*normal, *outliers], float)
    ties = (grid[1:] + grid[:-1]) / 2
    x = np.concatenate([rng.normal(0, form.top / 3, 700), rng.normal(0, outliers[-1] / 2, 300), grid, ties, -grid])
    x = rng.permutation(np.append(x, [0.0] * (x.size % 2))).astype(np.float32)
    if not form.signed:
        assert np.array_equal(form.encode(x, np.ones(1, np.float32)).codes, form.encode(x.clip(0), np.ones(1)).codes)
        x = np.abs(x)
    encoded = form.encode(x, np.ones(1, np.float32))
    assert form.decode(encoded).tolist() == brute_force(x.astype(float).tolist(), 0, keep, (normal, outliers))
    assert np.array_equal(form.decode(encoded), form.integers(encoded.codes))
    assert np.array_equal(form.unpack(form.pack(encoded), x.shape).codes, encoded.codes)


@pytest.mark.parametrize("granularity", ["row", "tensor", 16])
def test_scales_divide_before_rounding(granularity):
    rng = np.random.default_rng(6)
    x = rng.standard_t(3, (4, 32)).astype(np.float32)
    form = OutlierVictimPairs(4, granularity)
    encoded = form.encode(x)
    scales = encoded.scale.reshape(-1)
    rows = x.reshape(len(scales), -1)
    for row, each, found in zip(rows, scales, form.decode(encoded).reshape(rows.shape), strict=True):
        expected = np.array(brute_force((row / each).astype(float).tolist(), 4, "larger"), np.float32) * each
        assert np.allclose(found, expected, rtol=1e-6)


def test_every_byte_of_unsigned_pairs():
    """The identifier is 15; an outlier beside it is 4 to 7 times a power of two, never the identifier itself."""
    form = OutlierVictimPairs(4, signed=False)
    pairs = np.stack([np.arange(256) & 15, np.arange(256) >> 4], axis=1).astype(np.uint8)
    legal = pairs[~(pairs == 15).all(axis=1)]
    for (a, b), value in zip(legal.tolist(), form.integers(legal).tolist(), strict=True):
        outlier = {code: (4 + code % 4) << (code // 4 + 2) for code in range(1, 15)} | {0: 0}
        assert value == ([outlier[a], 0] if b == 15 else [0, outlier[b]] if a == 15 else [a, b])
    with pytest.raises(InputError, match="two victims"):
        form.integers(np.array([15, 15], np.uint8))
    x = np.array([192, 0, 0, 500, 300, 200, 3, 17, -2, 16.9], np.float32)
    found = form.encode(x, np.ones(1, np.float32))
    assert form.decode(found).tolist() == [192, 0, 0, 192, 192, 0, 3, 14, 0, 14]
    assert formats.parse("ovp4_unsigned/tensor") == OutlierVictimPairs(4, "tensor", signed=False)


def test_unsigned_pairs_halve_the_step_of_what_is_never_negative():
    x = np.abs(np.random.default_rng(11).normal(size=(8, 256))).astype(np.float32)
    errors = [formats.error_statistics(formats.parse(f"ovp{bits}{sign}/row"), x).relative_mse
              for bits in (4, 8) for sign in ("_unsigned", "")]  # fmt: skip
    assert errors[0] < 0.5 * errors[1]
    assert errors[2] < 0.5 * errors[3]


def rows_of_many_kinds():
    """Normal, heavy-tailed, short, constant, tiny, huge, sparse and lopsided rows."""
    rng = np.random.default_rng(12)
    for size in (2, 30, 128, 130, 576, 1024, 4098):
        rows = [rng.normal(size=size), rng.standard_t(2, size), rng.standard_t(4, size) * 1e-30, np.full(size, 3.0),
                rng.laplace(size=size) * 1e30, np.zeros(size), rng.normal(size=size) * (rng.random(size) < 0.05),
                np.abs(rng.normal(size=size)) + 1, rng.integers(-3, 4, size), rng.uniform(-1, 1, size),
                np.where(np.arange(size) == 0, 1e4, rng.normal(size=size))]  # fmt: skip
        yield np.stack(rows).astype(np.float32)


@pytest.mark.parametrize("name", ["ovp4/row", "ovp4_flint/row", "ovp4_left/row", "ovp8/row", "ovp8_e4m3/row",
                                  "ovp4_unsigned/row", "ovp8_unsigned/row"])  # fmt: skip
def test_bounds_leave_out_no_scale_that_is_best(name):
    """The search with bounds against the one that tries every scale on every value: the same scales, bit for bit."""
    form = formats.parse(name)
    for rows in rows_of_many_kinds():
        found, none = form.search(rows, errors=False)
        every, error = form.search(rows, exhaustive=True)
        assert np.array_equal(found, every)
        assert none.size == 0
        again, least = form.search(rows)
        assert np.array_equal(again, every)
        assert np.array_equal(least, error)


@pytest.mark.parametrize("bits", [4, 8])
def test_bounds_on_clipped_integers(bits):
    for rows in rows_of_many_kinds():
        assert np.array_equal(clipping_search(rows, bits), clipping_search(rows, bits, exhaustive=True))


def test_bounds_on_a_whole_tensor():
    """More values than a bin of the histogram holds before it is emptied, and a wide search."""
    x = np.random.default_rng(13).standard_t(3, (1, 300_000)).astype(np.float32)
    for form in (
        OutlierVictimPairs(4, search_percent=(30, 400, 20)),
        OutlierVictimPairs(8, search_percent=(30, 400, 20)),
    ):
        assert np.array_equal(form.search(x, errors=False)[0], form.search(x, exhaustive=True)[0])


def test_the_reach_of_rows():
    x = np.random.default_rng(14).normal(3, 5, (3, 2500)).astype(np.float32)
    for form, found in ((f, f.search(x, errors=False)[0]) for f in (OutlierVictimPairs(4), OutlierVictimPairs(8))):
        reach = np.abs(x.mean(1, dtype=np.float64)) + 3 * x.std(1, dtype=np.float64)
        percent = found * form.top / reach * 100
        assert np.allclose(percent, np.rint(percent), atol=1e-4)


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


def test_plain_integers_are_clipped_where_the_error_is_least():
    rng = np.random.default_rng(7)
    rows = rng.standard_t(3, (3, 63)).astype(np.float32)
    for bits in (4, 8):
        top = (1 << (bits - 1)) - 1
        for row, found in zip(rows, clipping_search(rows, bits), strict=True):
            errors = {}
            for percent in range(100, 0, -2):
                scale = np.float32(float(np.abs(row).max()) / top * percent / 100)
                errors[scale] = float(np.square(np.clip(np.rint(row / scale), -top, top) * scale - row).sum())
            assert errors[min(errors, key=lambda each: abs(each - found))] == pytest.approx(
                min(errors.values()), rel=1e-5
            )
    assert (clipping_search(np.zeros((2, 4), np.float32), 4) > 0).all()


def test_a_wider_search_is_never_worse():
    x = np.random.default_rng(8).standard_t(2, (4, 256)).astype(np.float32)
    one, two = OutlierVictimPairs(8), OutlierVictimPairs(8, search_percent=(25, 1001, 2))
    assert (two.search(x)[1] <= one.search(x)[1]).all()
    found, error = one.search(x)
    assert np.allclose(error, np.square(one.decode(one.encode(x, found)) - x).sum(axis=1), rtol=1e-4)


def test_rows_of_zeros_and_constants():
    x = np.stack([np.zeros(8), np.full(8, 3.25), np.full(8, 1e-30), np.full(8, 1e30)]).astype(np.float32)
    for name in ("ovp4/row", "ovp8_e4m3/row", "ovp4_flint/row"):
        form = formats.parse(name)
        encoded = form.encode(x)
        assert (encoded.scale > 0).all()
        assert np.allclose(form.decode(encoded)[:3], x[:3], rtol=0.1, atol=1e-37)


def test_normal_type_is_chosen_by_error():
    rng = np.random.default_rng(9)
    uniform, heavy = rng.uniform(-1, 1, (8, 128)).astype(np.float32), rng.laplace(size=(8, 128)).astype(np.float32)
    assert adaptive_pairs(uniform).normal == "int"
    assert adaptive_pairs(heavy).normal == "flint"


@pytest.mark.parametrize("name", ["ovp4/row", "ovp8/tensor", "ovp4_flint/row", "ovp8_e4m3/row", "ovp4_left/16",
                                  "ovp4_bias3/row", "ovp4_flint_left/row", "ovp8_e3m4/tensor", "ovp4_unsigned/row",
                                  "ovp8_unsigned_left_e4m4/row"])  # fmt: skip
def test_names_come_back(name):
    assert formats.parse(name).name == name


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


FORMS = [OutlierVictimPairs(4, "row"), OutlierVictimPairs(4, "row", normal="flint"), OutlierVictimPairs(8, "row"),
         OutlierVictimPairs(8, "row", exponent_bits=4), OutlierVictimPairs(4, "row", signed=False)]  # fmt: skip


@pytest.mark.parametrize("left", FORMS, ids=lambda form: form.name)
@pytest.mark.parametrize("right", FORMS, ids=lambda form: form.name)
def test_the_datapath_on_exponents_and_integers(left, right):
    """4-bit integers and shifts only, against int64 products; all outliers; then packed bytes with scales."""
    rng = np.random.default_rng(10)
    a, b = (rng.standard_t(2, (3, 40)).astype(np.float32) for _ in range(2))
    one, two = left.encode(a), right.encode(b)
    expected = left.integers(one.codes) @ right.integers(two.codes).T
    assert np.array_equal(exponent_integer_matmul(left, one.codes, right, two.codes), expected)
    for form, codes in ((left, one.codes), (right, two.codes)):
        for exponent, integer in form.exponent_integers(codes):
            assert integer.min() >= -8
            assert integer.max() <= (7 if form.bits == 4 and form.signed else 15)
            assert exponent.min() >= 0
    found = packed_matmul(left, left.pack(one), (3, 40), right, right.pack(two), (3, 40))
    assert np.allclose(found, left.decode(one).astype(float) @ right.decode(two).T.astype(float), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_the_datapath_on_4096_largest_outliers(form):
    codes = form.encode(
        np.tile([float(form.largest), 0.0], 2048).astype(np.float32)[None], np.ones(1, np.float32)
    ).codes
    assert exponent_integer_matmul(form, codes, form, codes).item() == 2048 * form.largest**2
    if form.bits == 4:
        assert (4096 * form.largest**2).bit_length() + 1 <= 32


def test_pair_statistics():
    x = np.zeros(200, np.float32)
    x[[0, 10, 11]] = 100
    found = pair_statistics(x)
    assert (found.normal_normal, found.outlier_normal, found.outlier_outlier) == (98, 1, 1)
    assert found.largest_sigma == pytest.approx((100 - 1.5) / x.std(), rel=1e-4)


g16 = OutlierVictimPairs(4, 16)


@pytest.mark.parametrize(
    "make",
    [lambda: OutlierVictimPairs(4, bias=1), lambda: OutlierVictimPairs(4, normal="flint", bias=2),
     lambda: OutlierVictimPairs(8, bias=12), lambda: OutlierVictimPairs(8, normal="flint"),
     lambda: OutlierVictimPairs(4, normal="flint", signed=False), lambda: formats.parse("ovp4_unsigned_e2m1/row"),
     lambda: OutlierVictimPairs(4, exponent_bits=3), lambda: OutlierVictimPairs(8, exponent_bits=0),
     lambda: OutlierVictimPairs(4, normal="float"),  # type: ignore[arg-type]
     lambda: OutlierVictimPairs(4, search_percent=(0, 10, 2)), lambda: OutlierVictimPairs(4, search_percent=(9, 5, 2)),
     lambda: OutlierVictimPairs(4, pad=False).encode(np.ones((2, 5), np.float32)),
     lambda: OutlierVictimPairs(4).encode(np.array([[1, np.nan]], np.float32)),
     lambda: OutlierVictimPairs(4).encode(np.array([[1, -np.inf]], np.float32)),
     lambda: OutlierVictimPairs(4).encode(np.ones((1, 2), np.float32), np.array([np.inf])),
     lambda: formats.parse("ovp6/row"), lambda: formats.parse("ovp4_e4m3/row"), lambda: formats.parse("ovp4_wide/row"),
     lambda: formats.parse("ovp4/5"), lambda: formats.parse("ovp4/none"),
     lambda: OutlierVictimPairs(4, "tensor").decode(formats.Encoded(
         np.array([8, 8], np.uint8), np.ones((), np.float32), None, (2,))),
     lambda: exponent_integer_matmul(OutlierVictimPairs(4), np.zeros((1, 4), np.uint8), OutlierVictimPairs(4),
                                     np.zeros((1, 6), np.uint8)),
     lambda: packed_matmul(g16, g16.pack(g16.encode(np.ones((1, 32), np.float32))), (1, 32), g16,
                           g16.pack(g16.encode(np.ones((1, 32), np.float32))), (1, 32)),
     lambda: OutlierVictimPairs(5), lambda: OutlierVictimPairs(4, 3), lambda: OutlierVictimPairs(4, "none"),
     lambda: OutlierVictimPairs(4, "row", "right"),  # type: ignore[arg-type]
     lambda: OutlierVictimPairs(4).encode(np.ones((2, 4), np.float32), np.zeros(2)),
     lambda: OutlierVictimPairs(8).operand_words(OutlierVictimPairs(8).encode(np.ones((2, 4), np.float32))),
     lambda: OutlierVictimPairs(4, "tensor").unpack(np.array([0x88, 0, 0, 0, 0], np.uint8), (2,))],
)  # fmt: skip
def test_bad_input(make):
    with pytest.raises(InputError):
        make()
