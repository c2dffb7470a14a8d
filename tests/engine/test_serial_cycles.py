"""Cycle counts of serial engines against a simulation that steps the hardware cycle by cycle."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitwright.arithmetic import encodings
from bitwright.core.errors import InputError
from bitwright.engine.digit_profiles import (
    OperandProfile,
    distribution_profile,
    measure_profile,
    normal_profile,
    profile_from_json,
)
from bitwright.engine.expected_cycles import block_cycles, expected_array_cycles
from bitwright.engine.serial_cycles import (
    array_cycles,
    column_cycles,
    normal_operand,
    stream_cycles,
    utilisation_closed_form,
    utilisation_monte_carlo,
)

ENT = encodings.get("ent")


def step_hardware(rows, encoding, bits, group, lanes, block):
    """Cycles of an array whose columns hold `rows`, stepped one clock edge at a time; also of every column alone."""
    step = group * lanes
    padded = [list(row) + [0] * (-len(row) % step) for row in rows]
    length = len(padded[0]) if block is None else max(1, block // step) * step
    codes = [[encoding.digits(np.array([value]), bits)[0].tolist() for value in row] for row in padded]
    weights = len(codes[0][0])
    clock, busy = 0, [0] * len(rows)
    for start in range(0, len(padded[0]), length):
        stop = min(start + length, len(padded[0]))
        columns = []
        for row in codes:
            passes = []
            for weight in range(weights):
                queues = [[] for _ in range(lanes)]
                for number, first in enumerate(range(start, stop, group)):
                    issued = [k for k in range(first, first + group) if row[k][weight] != 0]
                    queues[number % lanes].append(issued or [None])  # None: the idle cycle, B forced to zero
                passes.append([[k for issued in queue for k in issued] for queue in queues])
            columns.append(passes)
        state = [0] * len(rows)  # the pass a column is in
        while any(at < weights for at in state):
            for column, passes in enumerate(columns):
                if state[column] < weights:
                    busy[column] += 1
                    for queue in passes[state[column]]:
                        if queue:
                            queue.pop(0)
                    if not any(passes[state[column]]):
                        state[column] += 1
            clock += 1
    return clock, busy


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    shape=st.tuples(st.integers(1, 4), st.integers(1, 40)),
    name=st.sampled_from(["ent", "mbe", "csd", "twos-complement"]),
    bits=st.sampled_from([4, 6, 8, 14, 16]),
    group=st.sampled_from([1, 3, 4]),
    lanes=st.sampled_from([1, 2, 4]),
    block=st.sampled_from([None, 1, 8, 20, 32]),
)
def test_equals_the_stepped_hardware(data, shape, name, bits, group, lanes, block):
    low = 1 << (bits - 1)
    flat = data.draw(st.lists(st.integers(-low, low - 1), min_size=shape[0] * shape[1], max_size=shape[0] * shape[1]))
    a = np.array(flat).reshape(shape)
    encoding = encodings.get(name)
    clock, busy = step_hardware(a, encoding, bits, group, lanes, block)
    columns = column_cycles(a, encoding, bits, group, lanes, block)
    assert columns.sum(axis=1).tolist() == busy
    assert columns.max(axis=0).sum() == clock
    whole = array_cycles(a, 5, shape[0], 5, encoding, bits, group, lanes, block)
    assert whole.cycles == clock
    assert (whole.busiest_column, whole.least_busy_column) == (max(busy), min(busy))


def test_known_groups():
    # 91 = (1, 2, -1, -1), 6 = (0, 0, 1, 2), top digit first: per bit weight 2, 2, 1, 1 digits
    assert column_cycles([[91, 6, 0, 0]], ENT).tolist() == [[6]]
    assert column_cycles(np.zeros((2, 12), np.int8), ENT).tolist() == [[12], [12]]  # idle cycles
    assert stream_cycles(np.zeros((1, 12), np.int8), ENT, idle_cycle=False).sum() == 0
    # four groups on four lanes: all lanes wait for the fullest one at every bit weight
    assert column_cycles([[91] * 4 + [0] * 12], ENT, lanes=4).tolist() == [[16]]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 70), st.sampled_from([1, 4]))
def test_bounds_and_monotonicity(seed, k, lanes):
    a = np.random.default_rng(seed).integers(-128, 128, (6, k))
    cycles = column_cycles(a, ENT, lanes=lanes)
    steps = -(-k // (4 * lanes))
    assert (cycles >= 4 * steps).all()
    assert (cycles <= 16 * steps).all()
    thinned = np.where(np.random.default_rng(seed + 1).random(a.shape) < 0.5, 0, a)
    assert (column_cycles(thinned, ENT, lanes=lanes) <= cycles).all()
    longer = column_cycles(np.hstack([a, a]), ENT, lanes=lanes)
    assert (longer >= cycles).all()
    blocked = column_cycles(a, ENT, lanes=lanes, block=16)
    assert (blocked.sum(axis=1) >= cycles[:, 0]).all()  # joining more often is never faster
    wide = array_cycles(a, 3, 6, 3, ENT, lanes=lanes)
    assert wide.cycles <= array_cycles(a, 3, 2, 3, ENT, lanes=lanes).cycles
    assert 0 < wide.lane_utilisation <= wide.column_utilisation <= 1


def test_tiles_and_overheads():
    a = normal_operand(10, 24, seed=1)
    plain = array_cycles(a, 9, 4, 4, ENT, block=8)
    columns = column_cycles(a, ENT, block=8)
    tiles = [columns[start : start + 4].max(axis=0).sum() for start in (0, 4, 8)]
    assert plain.cycles == 3 * sum(tiles)
    assert array_cycles(a, 9, 4, 4, ENT, block=8, pass_overhead=5, tile_overhead=7).cycles == plain.cycles + 9 * (
        3 * 4 * 5 + 7
    )
    assert plain.macs == 10 * 24 * 9


def test_published_utilisation():
    """The Monte-Carlo figures for EN-T, sigma 25, 32 columns; see the docstring of what a lane loses."""
    for k, expected in zip((32, 64, 256, 768, 3072), (0.90, 0.92, 0.96, 0.98, 0.99), strict=True):
        column, _ = utilisation_monte_carlo(k, 32, ENT, trials=40)
        assert column == pytest.approx(expected, abs=0.012)
        assert utilisation_closed_form(k, 32, 2.41, 0.75) == pytest.approx(column, abs=0.03)
    for k, expected in zip((32, 64, 256, 768, 3072), (0.70, 0.76, 0.86, 0.91, 0.96), strict=True):
        _, lanes = utilisation_monte_carlo(k, 32, ENT, lanes=4, trials=40, idle_cycle=False)
        assert lanes == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((np.zeros((2, 4)),), "float64"),
        ((np.zeros(4, np.int8),), r"\(4,\)"),
        ((np.zeros((0, 4), np.int8),), r"\(0, 4\)"),
        ((np.full((1, 4), 200),), "8 bits"),
        ((np.zeros((1, 4), np.int8), ENT, 7), "even width"),
        ((np.zeros((1, 4), np.int8), ENT, 8, 0), "group"),
        ((np.zeros((1, 4), np.int8), ENT, 8, 4, 0), "lanes"),
        ((np.zeros((1, 4), np.int8), ENT, 8, 4, 1, 0), "block"),
    ],
)
def test_bad_operands(arguments, says):
    with pytest.raises(InputError, match=says):
        column_cycles(arguments[0], *(arguments[1:] or (ENT,)))


def test_bad_arrays():
    a = np.zeros((1, 4), np.int8)
    with pytest.raises(InputError, match="columns"):
        array_cycles(a, 1, 0, 1, ENT)
    with pytest.raises(InputError, match="Overheads"):
        array_cycles(a, 1, 1, 1, ENT, pass_overhead=-1)
    with pytest.raises(InputError, match="positive mean"):
        utilisation_closed_form(9, 32, 0, 1)
    with pytest.raises(InputError, match="deviation"):
        normal_operand(1, 1, 0)


def test_profile_of_a_distribution_equals_counting():
    rng = np.random.default_rng(0)
    weights = rng.random(256)
    exact = distribution_profile(weights, "mbe")
    drawn = rng.choice(np.arange(-128, 128), (2000, 64), p=weights / weights.sum())
    measured = measure_profile(drawn, "mbe")
    assert exact.digits == pytest.approx(
        float(encodings.get("mbe").nonzero_digits(np.arange(-128, 128), 8) @ weights / weights.sum())
    )
    assert measured.table == pytest.approx(exact.table, abs=0.01)
    assert measured.group_variance == pytest.approx(exact.group_variance, rel=0.02)
    assert measured.row_variance < 0.02 * exact.group_variance
    assert measured.issue_cycles == pytest.approx(column_cycles(drawn, encodings.get("mbe")).mean() / 64)
    assert profile_from_json(measured.to_json()) == measured


def test_normal_profile_has_the_published_digits():
    assert normal_profile().digits == pytest.approx(2.22, abs=0.05)
    assert normal_profile(encoding="mbe").digits == pytest.approx(2.41, abs=0.05)
    assert normal_profile(20.0).digits == pytest.approx(2.12, abs=0.01)
    assert normal_profile(20.0).issue_cycles - normal_profile(20.0).digits == pytest.approx(0.23, abs=0.01)


@pytest.mark.parametrize("lanes", [1, 4])
@pytest.mark.parametrize("k", [9, 25, 64, 300])
def test_expectation_equals_the_mean_of_exact_counts(k, lanes):
    a = normal_operand(24 * 150, k, seed=k)
    exact = array_cycles(a, 8, 24, 8, ENT, lanes=lanes)
    expected = expected_array_cycles(normal_profile(25.0), len(a), 8, k, 24, 8, lanes)
    assert expected.cycles == pytest.approx(exact.cycles, rel=0.012)
    assert expected.average_column * 24 == pytest.approx(exact.average_column * 24, rel=0.01)
    assert expected.utilisation == pytest.approx(exact.lane_utilisation, rel=0.02)


def test_rows_of_different_size_drift_further_apart():
    rng = np.random.default_rng(3)
    scale = rng.uniform(2, 40, (24 * 100, 1))
    a = np.clip(np.rint(rng.normal(size=(len(scale), 256)) * scale), -127, 127).astype(np.int64)
    exact = array_cycles(a, 1, 24, 1, ENT)
    profile = measure_profile(a)
    assert profile.row_variance > 0.1
    expected = expected_array_cycles(profile, len(a), 1, 256, 24, 1)
    assert expected.cycles == pytest.approx(exact.cycles, rel=0.02)
    assert expected.fastest_column == pytest.approx(column_cycles(a, ENT).reshape(100, 24).min(axis=1).sum(), rel=0.02)
    independent = OperandProfile("", "ent", 8, 4, profile.shares, profile.group_variance)
    assert expected_array_cycles(independent, len(a), 1, 256, 24, 1).cycles < 0.93 * exact.cycles


def test_blocks_and_single_columns():
    profile = normal_profile(25.0)
    mean, slowest, fastest, stream = block_cycles(profile, 64, 1, 1)
    assert mean == pytest.approx(slowest) == pytest.approx(fastest) == pytest.approx(stream)
    whole = expected_array_cycles(profile, 32, 1, 100, 32, 1)
    blocked = expected_array_cycles(profile, 32, 1, 100, 32, 1, block=20, pass_overhead=3, tile_overhead=2)
    assert blocked.cycles > whole.cycles + 5 * 4 * 3 + 2
    zeros = expected_array_cycles(measure_profile(np.zeros((4, 16), np.int8)), 4, 4, 16, 4, 4)
    assert zeros.cycles == pytest.approx(16)


def test_bad_profiles():
    with pytest.raises(InputError, match="distribution"):
        OperandProfile("x", "ent", 8, 4, ((1.0,),), 0.0)
    with pytest.raises(InputError, match="256 weights"):
        distribution_profile([1.0])
    with pytest.raises(InputError, match="positive"):
        normal_profile(-1.0)
    with pytest.raises(InputError, match="Not a stored"):
        profile_from_json({"origin": "x"})
    with pytest.raises(InputError, match="columns"):
        expected_array_cycles(normal_profile(), 1, 1, 1, 0, 1)
