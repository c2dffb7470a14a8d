"""Cycle counts of bit-slice engines against loops over single operands."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitwright.arithmetic import encodings
from bitwright.arithmetic.statistics import issue_cycles
from bitwright.core.errors import InputError
from bitwright.engine.bit_slice_cycles import (
    bitlet_cycles,
    bitwave_cycles,
    laconic_cycles,
    parallel_cycles,
    serial_digit_cycles,
    sibia_cycles,
    signed_bit_slices,
    term_pairs,
)

SHAPES = ((1, 1, 1), (2, 5, 3), (3, 16, 4), (5, 37, 6), (4, 130, 3))
COUNTERS = (laconic_cycles, bitlet_cycles, sibia_cycles, bitwave_cycles, serial_digit_cycles, parallel_cycles)


def operands(m, k, n, seed=0, low=-128):
    generator = np.random.default_rng(seed)
    values = [generator.integers(low, 128, shape).astype(np.int8) for shape in ((m, k), (k, n))]
    for matrix in values:
        matrix[generator.random(matrix.shape) < 0.3] = 0
    return values


def signed_digits(value):
    """Non-adjacent form, lowest digit first: take away the odd remainder that leaves a multiple of four."""
    digits = []
    while value:
        digit = 0 if value % 2 == 0 else 2 - value % 4
        digits.append(digit)
        value = (value - digit) // 2
    return digits


def terms(value):
    return sum(digit != 0 for digit in signed_digits(int(value)))


def groups(length, size):
    return [range(start, min(start + size, length)) for start in range(0, length, size)]


def slow_laconic(a, w, lanes, rows, columns):
    (m, k), n = a.shape, w.shape[1]
    cycles = pairs = 0
    for group in groups(k, lanes):
        for tile_m in groups(m, rows):
            for tile_n in groups(n, columns):
                found = [terms(a[i, p]) * terms(w[p, j]) for i in tile_m for j in tile_n for p in group]
                cycles += max(1, *found, 1) * rows * columns
                pairs += sum(found)
    return cycles, pairs


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("lanes", "tile"), [(16, (1, 1)), (3, (1, 1)), (1, (1, 1)), (16, (2, 2)), (5, (3, 1))])
def test_laconic_counts_the_slowest_lane_of_every_group(shape, lanes, tile):
    a, w = operands(*shape)
    found = laconic_cycles(a, w, lanes=lanes, tile=tile)
    assert (found.cycles, found.operations) == slow_laconic(a, w, lanes, *tile)
    assert (found.macs, found.lanes) == (math.prod(shape), lanes)


def test_laconic_in_several_blocks_of_rows():
    a, w = operands(2100, 18, 2)
    whole = laconic_cycles(a, w)
    parts = [laconic_cycles(part, w) for part in np.array_split(a, 7)]
    assert (whole.cycles, whole.operations) == (sum(p.cycles for p in parts), sum(p.operations for p in parts))
    coupled = laconic_cycles(a, w, tile=(3, 2))
    assert coupled.cycles == sum(laconic_cycles(a[i : i + 3], w, tile=(3, 2)).cycles for i in range(0, 2100, 3))


@pytest.mark.parametrize("encoding", encodings.names())
def test_laconic_with_other_digits(encoding):
    a, w = operands(3, 20, 2)
    code = encodings.get(encoding)
    pairs = np.array([[[code.nonzero_digits(a[i, p], 8) * code.nonzero_digits(w[p, j], 8) for p in range(20)]
                       for j in range(2)] for i in range(3)])  # fmt: skip
    slow = sum(
        max(1, pairs[i, j, part].max()) for i in range(3) for j in range(2) for part in (slice(16), slice(16, 20))
    )
    assert laconic_cycles(a, w, encoding=encoding).cycles == slow
    assert laconic_cycles(a, w, encoding=encoding).operations == pairs.sum()


def test_term_pairs_of_every_pair_of_operands():
    every = np.arange(-128, 128).astype(np.int8)
    count = [terms(v) for v in range(-128, 128)]
    found = term_pairs(every[:, None], every, encodings.get("csd"))
    assert np.array_equal(found, np.outer(count, count))
    assert found.max() == 16


def magnitude_bits(value):
    return [abs(int(value)) >> place & 1 for place in range(8)]


def walk(bits, window):
    """One lane of the released Bitlet RTL: its cycles over a list of bits."""
    position = cycles = 0
    while position < len(bits):
        ones = [i for i, bit in enumerate(bits[position : position + window]) if bit]
        position += ones[1] if len(ones) > 1 else window
        cycles += 1
    return cycles


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("group", "window"), [(64, None), (7, None), (1, None), (64, 8), (12, 5)])
def test_bitlet_counts_the_fullest_bit_position(shape, group, window):
    a, w = operands(*shape)
    m, k, n = shape
    cycles = ones = 0
    for j in range(n):
        for part in groups(k, group):
            rows = [magnitude_bits(w[p, j]) for p in part]
            if window is None:
                lanes = [sum(column) for column in zip(*rows, strict=True)]
            else:
                rows += [[0] * 8] * (group - len(rows))
                lanes = [walk(column, window) for column in zip(*rows, strict=True)]
            cycles += max(1, *lanes)
            ones += sum(map(sum, rows))
    found = bitlet_cycles(a, w, group=group, window=window)
    assert (found.cycles, found.operations, found.lanes) == (cycles * m, ones * m, 8)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("group", [8, 3, 1])
def test_bitwave_leaves_out_empty_bit_columns(shape, group):
    a, w = operands(*shape)
    m, k, n = shape
    cycles = 0
    for j in range(n):
        for part in groups(k, group):
            union = 0
            for p in part:
                union |= abs(int(w[p, j]))
            cycles += max(1, union.bit_count())
    found = bitwave_cycles(a, w, group=group)
    assert found.cycles == cycles * m
    assert found.operations == sum(abs(int(v)).bit_count() for v in w.ravel()) * m


def slices_of(value):
    """Signed slices by hand: three-bit groups of the sign-extended value, then the sign moved into every one."""
    text = format(value & 0x3FF, "010b")
    high, middle, low = int(text[0:4], 2), int(text[4:7], 2), int(text[7:10], 2)
    high -= 16 if high > 7 else 0
    if value < 0:
        return [low - 8, middle - 8 + 1, high + 1]
    return [low, middle, high]


def test_signed_bit_slices_of_all_bytes():
    every = np.arange(-128, 128)
    slices = signed_bit_slices(every)
    assert slices.tolist() == [slices_of(v) for v in range(-128, 128)]
    assert np.array_equal(slices.astype(int) @ [1, 8, 64], every)
    assert slices.min() >= -8
    assert slices.max() <= 7
    for value in range(1, 8):  # small values of either sign have one slice, in contrast to two's complement
        assert np.count_nonzero(signed_bit_slices(np.array([value, -value])), axis=1).tolist() == [1, 1]


@given(st.lists(st.integers(-(2**12), 2**12 - 1), min_size=1, max_size=20))
@settings(max_examples=50, deadline=None)
def test_four_slices_hold_thirteen_bits(values):
    slices = signed_bit_slices(np.array(values), 4)
    assert np.array_equal(slices.astype(int) @ [1, 8, 64, 512], values)
    assert slices.min() >= -8
    assert slices.max() <= 7


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("lanes", [4, 1, 6])
def test_sibia_skips_empty_slice_vectors(shape, lanes):
    a, w = operands(*shape)
    (m, k, n), counted = shape, {}
    for name, matrix, repeats in (("input", a, n), ("weight", w.T, m)):
        cycles = 0
        for row in matrix.tolist():
            for part in groups(k, lanes):
                vectors = zip(*(slices_of(row[p]) for p in part), strict=True)
                cycles += max(1, 3 * sum(any(vector) for vector in vectors))
        counted[name] = cycles * repeats
        assert sibia_cycles(a, w, lanes=lanes, skip=name).cycles == counted[name]
    assert sibia_cycles(a, w, lanes=lanes).cycles == min(counted.values())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("lanes", [1, 4])
def test_serial_digits_wait_at_every_bit_weight(shape, lanes):
    a, w = operands(*shape)
    _, k, n = shape
    full, cycles = -(-k // (4 * lanes)) * 4 * lanes, 0
    for row in a.tolist():
        digits = encodings.get("ent").digits(np.array(row + [0] * (full - k)), 8)
        for weight in range(4):
            streams = []
            for lane in range(lanes):
                groups = range(4 * lane, full, 4 * lanes)  # they go round the lanes
                streams.append(sum(max(1, sum(d != 0 for d in digits[i : i + 4, weight])) for i in groups))
            cycles += max(streams)
    found = serial_digit_cycles(a, w, lanes=lanes)
    assert found.cycles == cycles * n
    if lanes == 1 and k % 4 == 0:
        assert found.cycles_per_mac == pytest.approx(issue_cycles(a, encodings.get("ent")))


def test_nothing_but_zeros_takes_one_cycle_per_group():
    a, w = np.zeros((3, 128), np.int8), np.zeros((128, 5), np.int8)
    for counter, per_result in (
        (laconic_cycles, 8), (bitlet_cycles, 2), (sibia_cycles, 32), (bitwave_cycles, 16), (serial_digit_cycles, 128)
    ):  # fmt: skip
        found = counter(a, w)
        assert found.cycles == per_result * 15
        assert (found.operations, found.utilisation, found.lane_maximum_penalty) == (0, 0, math.inf)
    assert bitlet_cycles(a, w, window=8).cycles == 8 * 2 * 15


def test_the_most_negative_operand():
    a, w = np.full((2, 64), -128, np.int8), np.full((64, 3), -128, np.int8)
    expected = {laconic_cycles: 4, bitlet_cycles: 64, sibia_cycles: 16 * 9, bitwave_cycles: 8, serial_digit_cycles: 112}
    for counter, per_result in expected.items():
        assert counter(a, w).cycles == per_result * 6
    assert laconic_cycles(a, w).lane_maximum_penalty == 1


def test_lanes_wait_on_normal_data():
    samples = np.random.default_rng(0).normal(0, 1, (2, 128, 256))
    a, w = np.rint(samples * (127 / np.abs(samples).max())).astype(np.int8)
    alone, coupled = laconic_cycles(a, w.T), laconic_cycles(a, w.T, tile=(16, 16))
    assert 1.5 < alone.lane_maximum_penalty < coupled.lane_maximum_penalty
    assert alone.utilisation == pytest.approx(1 / alone.lane_maximum_penalty)
    assert laconic_cycles(a, w.T, lanes=1).lane_maximum_penalty < 1.1
    assert alone.operations_per_mac == pytest.approx(4.7, rel=0.05)  # about 2.18 digits squared
    assert bitlet_cycles(a, w.T).lane_maximum_penalty > 1


@pytest.mark.parametrize("counter", COUNTERS)
def test_bad_operands_are_refused(counter):
    a, w = operands(2, 8, 3)
    for bad in ((a.astype(float), w), (a, w.astype(np.int32)), (a.astype(np.uint8), w)):
        with pytest.raises(InputError, match="int8"):
            counter(*bad)
    for bad in ((a, w.T), (a[0], w), (a, w[:, 0]), (a[None], w)):
        with pytest.raises(InputError, match="matrices"):
            counter(*bad)
    with pytest.raises(InputError, match="nothing"):
        counter(a[:0], w)


def test_bad_parameters_are_refused():
    a, w = operands(2, 8, 3)
    for value in (0, -1, 2.0, True):
        for counter in (laconic_cycles, sibia_cycles, serial_digit_cycles):
            with pytest.raises(InputError, match="lanes is a whole number"):
                counter(a, w, lanes=value)
        for counter in (bitlet_cycles, bitwave_cycles):
            with pytest.raises(InputError, match="group is a whole number"):
                counter(a, w, group=value)
    with pytest.raises(InputError, match="window"):
        bitlet_cycles(a, w, window=0)
    with pytest.raises(InputError, match="tile"):
        laconic_cycles(a, w, tile=(0, 4))
    with pytest.raises(InputError, match="skip"):
        sibia_cycles(a, w, skip="both")
    with pytest.raises(InputError, match="Unknown digit encoding"):
        laconic_cycles(a, w, encoding="booth")
    with pytest.raises(InputError, match="broadcast"):
        term_pairs(a, w, encodings.get("csd"))
    with pytest.raises(InputError, match="int8"):
        term_pairs(a, 1.5, encodings.get("csd"))
    with pytest.raises(InputError, match="do not fit"):
        signed_bit_slices(np.array([600]))
    with pytest.raises(InputError, match="integers"):
        signed_bit_slices(np.array([0.5]))
