import numpy as np
import pytest
from scipy.stats import norm

from bitwright.arithmetic import encodings
from bitwright.arithmetic.statistics import digit_statistics, from_value_histogram, issue_cycles
from bitwright.core.errors import InputError

SIGMAS = (10, 20, 30, 40, 50)


def normal(sigma, shape, seed=0, to_integer=np.rint):
    return np.clip(to_integer(np.random.default_rng(seed).normal(0, sigma, shape)), -128, 127).astype(np.int8)


@pytest.mark.parametrize("sigma", SIGMAS)
@pytest.mark.parametrize("name", ["ent", "mbe", "csd"])
def test_means_of_normal_data_equal_the_sum_over_its_distribution(name, sigma):
    values = np.arange(-128, 128)
    edges = np.concatenate([[-np.inf], values[1:] - 0.5, [np.inf]])
    probability = np.diff(norm.cdf(edges / sigma))
    expected = sum(
        p * np.count_nonzero(encodings.get(name).digits(np.array(v), 8))
        for p, v in zip(probability, values, strict=True)
    )
    assert digit_statistics(normal(sigma, (1024, 1024)), encodings.get(name)).mean == pytest.approx(expected, rel=0.002)


def test_issue_cycles_count_idle_groups():
    # Measured before with other code, on samples truncated towards zero (digit means 1.68/2.07/2.30/2.46/2.57).
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
    assert np.allclose(
        digit_statistics(data[::2, ::2], ent).shares, digit_statistics(data[::2, ::2].copy(), ent).shares
    )
    assert digit_statistics(data.astype(np.int32), ent, 16).mean == pytest.approx(digit_statistics(data, ent).mean)


def test_bad_input_is_refused():
    ent = encodings.get("ent")
    with pytest.raises(InputError, match="at least one"):
        digit_statistics(np.empty(0, np.int8), ent)
    with pytest.raises(InputError, match="256 counts"):
        from_value_histogram(np.ones(255), ent)
    with pytest.raises(InputError, match="multiple of 4"):
        issue_cycles(np.zeros((2, 6), np.int8), ent)
