import numpy as np
import pytest

from bitwright.arithmetic import encodings
from bitwright.core.errors import InputError, UnknownNameError

WIDTHS = range(4, 17)


def every(bits):
    return np.arange(-(1 << (bits - 1)), 1 << (bits - 1))


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("name", encodings.names())
def test_every_value_is_the_sum_of_its_weighted_digits(name, bits):
    encoding = encodings.get(name)
    if encoding.even_widths and bits % 2:
        with pytest.raises(InputError, match="even width"):
            encoding.digits(every(bits), bits)
        return
    digits = encoding.digits(every(bits), bits)
    # Summed in Python integers, not by the method under test.
    totals = [sum(int(d) * encoding.radix**i for i, d in enumerate(row)) for row in digits]
    assert totals == every(bits).tolist()
    assert np.array_equal(encoding.decode(digits), every(bits))
    assert set(np.unique(digits).tolist()) <= set(encoding.digit_set)


# Top digit first; arXiv 2503.06342 and the definition of both codes.
WORKED = {
    "mbe": {91: [1, 2, -1, -1], 124: [2, 0, -1, 0], 127: [2, 0, 0, -1], 6: [0, 0, 2, -2], -128: [-2, 0, 0, 0]},
    "ent": {91: [1, 2, -1, -1], 124: [2, 0, -1, 0], 127: [2, 0, 0, -1], 6: [0, 0, 1, 2], -91: [-1, -2, 1, 1]},
}


@pytest.mark.parametrize("name", WORKED)
def test_worked_values(name):
    for value, digits in WORKED[name].items():
        assert encodings.get(name).digits(np.array([value]), 8)[0, ::-1].tolist() == digits


@pytest.mark.parametrize(
    ("name", "histogram"),
    [
        ("mbe", [1, 12, 54, 108, 81]),
        ("ent", [1, 15, 60, 108, 72]),
        ("csd", [1, 15, 72, 120, 48, 0, 0, 0, 0]),
        ("sign-magnitude", [1, 15, 42, 70, 70, 42, 14, 2, 0]),
        ("twos-complement", [1, 8, 28, 56, 70, 56, 28, 8, 1]),
    ],
)
def test_histograms_of_all_int8_values(name, histogram):
    counts = np.bincount(encodings.get(name).nonzero_digits(every(8), 8), minlength=len(histogram))
    assert counts.tolist() == histogram


def test_ent_is_the_carry_recoding_of_its_gates():
    """The bit-level rule: slice + carry modulo 4, carry out when both bits are set or the upper one meets a carry."""
    for value in range(-128, 128):
        magnitude, carry, digits = abs(value), 0, []
        for place in range(4):
            low, high = magnitude >> 2 * place & 1, magnitude >> (2 * place + 1) & 1
            code = (2 * high + low + carry) % 4
            carry = (high & low) | (high & carry)
            digits.append(-1 if code == 3 and place < 3 else code)
        signed = [-d if value < 0 else d for d in digits]
        assert encodings.get("ent").digits(np.array([value]), 8)[0].tolist() == signed


@pytest.mark.parametrize("bits", WIDTHS)
def test_canonical_signed_digit_has_no_neighbours_and_is_minimal(bits):
    digits = encodings.get("csd").digits(every(bits), bits)
    assert not ((digits[:, 1:] != 0) & (digits[:, :-1] != 0)).any()


def test_code_bits():
    assert encodings.get("ent").code_bits(8) == 9
    assert encodings.get("mbe").code_bits(8) == 12


def test_bad_input_is_refused():
    mbe = encodings.get("mbe")
    with pytest.raises(InputError, match="do not fit 8 bits"):
        mbe.digits(np.array([128]), 8)
    with pytest.raises(InputError, match="integers"):
        mbe.digits(np.array([1.0]), 8)
    with pytest.raises(InputError, match="outside"):
        mbe.digits(np.array([1]), 1)
    with pytest.raises(UnknownNameError, match="mbe"):
        encodings.get("booth")
