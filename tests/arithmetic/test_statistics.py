import numpy as np
import pytest
from bitwright.arithmetic import encodings
from bitwright.arithmetic.statistics import digit_statistics, from_value_histogram, issue_cycles
from bitwright.core.errors import InputError

# Average partial products of EN-T encoded N(0, sigma) INT8 data as published with arXiv 2503.06342. How its samples
# became integers is not stated: the row of K = 128 agrees with rounding (within 1 %), that of K = 32 with truncation
# towards zero (within 2 %; rounding would differ by up to 3.2 %).
SIGMAS = (10, 20, 30, 40, 50)
PUBLISHED = [(128, np.rint, (1.75, 2.10, 2.32, 2.48, 2.60)), (32, np.trunc, (1.71, 2.05, 2.27, 2.45, 2.57))]


def normal(sigma, shape, seed=0, to_integer=np.rint):
    return np.clip(to_integer(np.random.default_rng(seed).normal(0, sigma, shape)), -128, 127).astype(np.int8)


@pytest.mark.parametrize(("depth", "to_integer", "published"), PUBLISHED)
def test_average_partial_products_of_normal_data(depth, to_integer, published):
    for sigma, figure in zip(SIGMAS, published, strict=True):
        data = normal(sigma, (8192, depth), to_integer=to_integer)
        assert digit_statistics(data, encodings.get("ent")).mean == pytest.approx(figure, rel=0.03), sigma


def test_issue_cycles_count_idle_groups():
    # Published beside digit means of 1.68/2.07/2.30/2.46/2.57, which truncated samples have.
    for sigma, figure in zip(SIGMAS, (2.00, 2.30, 2.43, 2.53, 2.61), strict=True):
        data = normal(sigma, (1024, 128), to_integer=np.trunc)
        assert issue_cycles(data, encodings.get("ent")) == pytest.approx(figure, rel=0.02)
    assert issue_cycles(np.zeros((1, 4), np.int8), encodings.get("ent")) == 1.0  # four idle groups, four operands


@pytest.mark.parametrize("name", encodings.names())
def test_the_native_kernel_equals_counting_digit_by_digit(name):
    encoding = encodings.get(name)
    for size in (1, 3, 4, 1023):
        data = np.random.default_rng(size).integers(-128, 128, size).astype(np.int8)
        counted = np.bincount([np.count_nonzero(encoding.digits(np.array(v), 8)) for v in data.tolist()],
                              minlength=encoding.digit_count(8) + 1)  # fmt: skip
        assert np.allclose(digit_statistics(data, encoding).shares, counted / size, atol=0)


def test_a_value_histogram_gives_the_same_statistics():
    data = normal(30, 5000)
    counts = np.bincount(data.astype(int) + 128, minlength=256)
    ent = encodings.get("ent")
    assert np.allclose(from_value_histogram(counts, ent).shares, digit_statistics(data, ent).shares)


def test_non_contiguous_and_wider_data():
    data = normal(30, (64, 64))
    ent = encodings.get("ent")
    assert np.allclose(digit_statistics(data[::2, ::2], ent).shares, digit_statistics(data[::2, ::2].copy(), ent).shares)
    assert digit_statistics(data.astype(np.int32), ent, 16).mean == pytest.approx(digit_statistics(data, ent).mean)


def test_bad_input_is_refused():
    ent = encodings.get("ent")
    with pytest.raises(InputError, match="at least one"):
        digit_statistics(np.empty(0, np.int8), ent)
    with pytest.raises(InputError, match="256 counts"):
        from_value_histogram(np.ones(255), ent)
    with pytest.raises(InputError, match="multiple of 4"):
        issue_cycles(np.zeros((2, 6), np.int8), ent)
