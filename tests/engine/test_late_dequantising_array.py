"""The model of arrays: cycles and traffic worked out by hand, the crossover, equal areas, parts from gates."""

import math
from dataclasses import replace

import numpy as np
import pytest

from bitwright.core.errors import InputError
from bitwright.core.workload import Gemm
from bitwright.engine.gate_simulation import simulate
from bitwright.engine.late_dequantiser_waveforms import waveforms
from bitwright.engine.late_dequantising_array import (
    ArrayFigures,
    BufferAndMemory,
    PartFigures,
    compare,
    equal_area,
    network_cost,
    product_cost,
)
from bitwright.engine.late_dequantising_parts import WeightExpander, array_figures, expander_figures
from bitwright.engine.libraries import find_library
from bitwright.engine.rtl.late_dequantiser import MixedArray
from bitwright.engine.standalone_units import unit_gates

LIBRARY = find_library("predictive-28nm")
MEMORY = BufferAndMemory(2**20, 1e12, 1e-14, 1e-12, 2e-12)
LATE = ArrayFigures("late", "late", 4, 8, 1e9, PartFigures(100.0, 2e-12, 1e-12), PartFigures(400.0, 9e-12, 3e-12),
                    PartFigures(50.0, 1e-12, 0.0), group=32)  # fmt: skip
PLAIN = replace(LATE, name="plain", order="none", weight_bits=8, scale_bits=0, dequantiser=PartFigures(0.0),
                row_sum=PartFigures(0.0))  # fmt: skip


def test_a_small_product_by_hand():
    cost = product_cost(Gemm(1, 6, 20, 70), LATE, MEMORY)
    cycles = 2 * 3 * 96 + 12  # two tiles of rows, three of columns, three padded groups; filling the array
    assert cost.compute_s == pytest.approx(cycles / 1e9)
    macs = 6 * 20 * 70
    assert cost.utilisation == pytest.approx(macs / (cycles * 32))
    assert cost.element_j == pytest.approx(macs * 2e-12 + (cycles * 32 - macs) * 1e-12)
    values = 6 * 20 * 3
    summed = 3 * 6 * 70  # every tile of columns has row sums of its own
    assert cost.dequantiser_j == pytest.approx(values * 9e-12 + (cycles * 8 - values) * 3e-12 + summed * 1e-12)
    table = 20 * 3 * 20
    assert cost.table_bits == pytest.approx(table)
    assert cost.read_bits == pytest.approx(20 * 70 * 4 + table + 6 * 70 * 8)
    assert cost.written_bits == 6 * 20 * 16
    assert cost.memory_j == pytest.approx(cost.read_bits * 1e-12 + cost.written_bits * 2e-12)
    assert cost.latency_s == max(cost.compute_s, cost.memory_s)


def test_draining_bounds_a_short_product():
    short = replace(PLAIN, rows=64)
    cost = product_cost(Gemm(1, 64, 8, 8), short, MEMORY)
    assert cost.compute_s == pytest.approx((64 + 64 + short.columns) / 1e9)  # 8 steps, but 64 to drain


def test_the_array_takes_as_long_as_its_hardware():
    """Groups of the generated array stream without gaps: stimulus for k positions is k cycles and the filling."""
    from bitwright.arithmetic.late_dequantisation import quantise_weights

    rng = np.random.default_rng(0)
    lengths = []
    for groups in (3, 5):
        weights = quantise_weights(rng.normal(size=(groups * 8, 4)), group=8, half_scales=True)
        x = rng.integers(-128, 128, (4, groups * 8)).astype(np.int8)
        lengths.append(waveforms(MixedArray("a8", 4, 4, 8), x, weights).cycles)
    array = replace(LATE, rows=4, columns=4, group=8)
    cycles = [product_cost(Gemm(1, 4, 4, 8 * groups), array, MEMORY).compute_s * 1e9 for groups in (3, 5)]
    assert lengths[1] - lengths[0] == round(cycles[1] - cycles[0]) == 16


@pytest.mark.parametrize("group", [32, 128])
def test_operations_cross_at_the_group_size(group):
    array = replace(LATE, group=group, zero_points=False)
    for m in (1, group - 1, group, group + 1):
        work = product_cost(Gemm(2, m, 64, 1024), array, MEMORY).work
        assert (work.late < work.classical_reused) == (m < group)
        assert work.classical == m * work.classical_reused == m * 2 * 64 * 1024
    work = product_cost(Gemm(1, group // 2, 64, 1024), replace(array, zero_points=True), MEMORY).work
    assert work.late == work.classical_reused


def test_equal_area_and_bounds():
    wide = equal_area(LATE, PLAIN.area_um2 * 10)
    assert wide.area_um2 <= PLAIN.area_um2 * 10 < wide.area_um2 + wide.column_area_um2
    slow = BufferAndMemory(2**20, 1e9)
    late, plain = (network_cost([Gemm(1, 1, 512, 512)] * 2, each, slow) for each in (LATE, PLAIN))
    found = compare(late, plain)  # bound by memory: bits of 8-bit weights over those of 4-bit weights and tables
    assert found.speed == found.memory
    assert 1.5 < found.speed < 8 / (4 + 20 / 32)
    assert late.latency_s == pytest.approx(2 * product_cost(Gemm(1, 1, 512, 512), LATE, slow).latency_s)
    assert compare(late, late).energy == 1


def test_expanded_weights_as_gates():
    """scale * (q - zero) rounded to FP16, for every code and zero point."""
    rng = np.random.default_rng(0)
    q, zero = (grid.reshape(-1) for grid in np.meshgrid(np.arange(16), np.arange(16)))
    scale = np.exp2(rng.uniform(-12, 11, (40, 256))).astype(np.float16)
    scale[:4] = np.array([[4400], [9000], [30000], [65504]])  # products to infinity as well
    drive = {"q": np.tile(q, (42, 1)), "zero": np.tile(zero, (42, 1)),
             "scale": np.pad(scale, ((0, 2), (0, 0)), mode="edge").view(np.uint16).astype(np.int64)}  # fmt: skip
    found = simulate(unit_gates(WeightExpander(), LIBRARY).netlist(LIBRARY), drive).outputs["weight"][2:]
    exact = scale.astype(np.float64) * (q - zero)
    with np.errstate(over="ignore"):
        expected = exact.astype(np.float16)
    expected[np.abs(expected) < 2.0**-14] = 0
    assert np.array_equal(found.astype(np.uint16).view(np.float16), expected)


@pytest.mark.slow
def test_figures_of_gates():
    late, plain = (array_figures(name, LIBRARY, 500e6, 4, 4) for name in ("MixPE-A8", "INT8"))
    assert late.element.area_um2 < plain.element.area_um2
    assert late.element.busy_j < plain.element.busy_j
    for part in (late.element, late.dequantiser, late.row_sum, plain.element):
        assert part.period_s <= 2e-9
        assert part.busy_j > part.idle_j > 0
    expander = expander_figures(LIBRARY, 500e6)
    assert 0 < expander.area_um2 < late.dequantiser.area_um2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: replace(LATE, group=7), "hand over their sums in 8"),
        (lambda: replace(LATE, order="never"), "late, early or none"),
        (lambda: replace(LATE, rows=0), "rows is 0"),
        (lambda: replace(LATE, clock_hz=math.inf), "clock"),
        (lambda: PartFigures(-1.0), "0 or more"),
        (lambda: PartFigures(1.0, math.nan), "0 or more"),
        (lambda: BufferAndMemory(0, 1), "above 0"),
        (lambda: equal_area(LATE, 100.0), "does not fit"),
        (lambda: network_cost([], LATE, MEMORY), "no products"),
        (lambda: array_figures("BitFusion", LIBRARY, 1e9), "Arrays are"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(InputError, match=message):
        call()
