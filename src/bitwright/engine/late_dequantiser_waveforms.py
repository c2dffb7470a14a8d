"""The array with late dequantisation against its model: stimulus, expected results, simulation as RTL and as gates."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bitwright.arithmetic.late_dequantisation import GroupedWeights, float_group_products, group_products
from bitwright.core.errors import InputError, UnknownNameError
from bitwright.engine.liberty import Library
from bitwright.engine.rtl.arithmetic import Design
from bitwright.engine.rtl.late_dequantiser import (
    ARRAY,
    DEQUANTISER,
    ELEMENT,
    ROW_SUM,
    Dequantiser,
    MixedArray,
    generate,
)
from bitwright.engine.synthesis import ArrayReport, synthesise_array
from bitwright.engine.testbench import simulate_amaranth, simulate_netlist, simulate_verilog
from bitwright.engine.waveforms import SimulationResult, Waveforms

SIMULATORS = ("amaranth", "icarus", "verilator")


def running_totals(x: ArrayLike, weights: GroupedWeights) -> NDArray[np.float32]:
    """Totals after every group, float32 (groups, m, n); the last ones times token scales are `matmul`'s result."""
    codes = np.asarray(x)
    total = np.zeros((codes.shape[0], weights.codes.shape[1]), np.float32)
    found = []
    whole = codes.dtype == np.int8
    products, sums = group_products(codes, weights) if whole else float_group_products(codes, weights)
    for at, scale in enumerate(weights.scale):
        zero = weights.zero[at].astype(sums.dtype)
        difference = products[at] - zero * sums[at][:, None]
        total = total + scale * difference.astype(np.float32)
        found.append(total)
    return np.array(found)


def waveforms(array: MixedArray, x: ArrayLike, weights: GroupedWeights) -> Waveforms:
    """Drive x (rows, k) and weights (k, columns) through the array; every total of every group must show.

    A short last group is padded with zeros. Raises InputError for other shapes, types and group sizes than the
    array's, codes of more than 4 bits, and scales that are not positive FP16 numbers.
    """
    codes = np.asarray(x)
    wanted = np.int8 if array.activations == "a8" else np.float16
    if codes.dtype != wanted or codes.shape != (array.rows, weights.codes.shape[0]):
        raise InputError(f"Expected {wanted.__name__} activations ({array.rows}, {weights.codes.shape[0]}), not "
                         f"{codes.dtype} {codes.shape}.")  # fmt: skip
    if weights.codes.shape[1] != array.columns or weights.group != array.group or weights.bits > 4:
        raise InputError(f"Expected weights of at most 4 bits, {array.columns} columns, groups of {array.group}.")
    half = weights.scale.astype(np.float16)
    if not (np.array_equal(half, weights.scale) and (half > 0).all()):
        raise InputError("The array's table holds FP16 scales above 0; quantise weights with half_scales.")
    groups, group, start = len(weights.scale), array.group, 1  # cycle 0 has the `last` that clears the sums
    padded = [(0, 0), (0, groups * group - codes.shape[1])]
    words = np.pad(codes, padded).view(np.int8 if wanted is np.int8 else np.int16).astype(np.int64)
    q = np.pad(weights.codes.astype(np.int64), padded[::-1])
    latency = Dequantiser.latency
    cycles = start + groups * group + array.value_cycle(array.rows - 1, array.columns - 1) + latency + 1
    inputs = {f"x_{row}": _placed(words[row], start + row, cycles) for row in range(array.rows)}
    last = np.zeros(cycles, np.int64)
    ends = start + group * np.arange(1, groups + 1) - 1
    last[0] = 1
    last[ends] = 1
    inputs["last"] = last
    totals = running_totals(codes, weights).view(np.uint32).astype(np.int64)
    expected: dict[str, NDArray[np.int64]] = {}
    care: dict[str, NDArray[np.bool_]] = {}
    for column in range(array.columns):
        inputs[f"q_{column}"] = _placed(q[:, column], start + 1 + column, cycles)
        y, valid, known = np.zeros(cycles, np.int64), np.zeros(cycles, np.int64), np.zeros(cycles, np.bool_)
        tables = {"zero": weights.zero[:, column].astype(np.int64),
                  "scale": half[:, column].view(np.uint16).astype(np.int64),
                  "first": (np.arange(groups) == 0).astype(np.int64)}  # fmt: skip
        at = {name: np.zeros(cycles, np.int64) for name in tables}
        for row in range(array.rows):
            valid[array.value_cycle(row, column) + latency] = 1  # of the clearing `last`, its value unknown
            arrival = ends + array.value_cycle(row, column)
            for name, table in tables.items():
                at[name][arrival] = table
            y[arrival + latency] = totals[:, row, column]
            valid[arrival + latency], known[arrival + latency] = 1, True
        inputs |= {f"{name}_{column}": table for name, table in at.items()}
        care[f"y_{column}"] = known
        expected |= {f"y_{column}": y, f"y_valid_{column}": valid}
    widths = {port.name: len(port) for port in array.ports}
    return Waveforms(inputs, expected, care, widths, array.flush_cycles, "clk", "")


def _placed(values: NDArray[np.int64], start: int, cycles: int) -> NDArray[np.int64]:
    return np.pad(values, (start, cycles - start - len(values)))


def verify(array: MixedArray, x: ArrayLike, weights: GroupedWeights, simulator: str = "amaranth") -> SimulationResult:
    """Simulate the array's RTL in amaranth, icarus or verilator. Raises as `waveforms`, and ToolError when a simulator
    is missing or fails."""
    driven = waveforms(array, x, weights)
    if simulator == "amaranth":
        return simulate_amaranth(Design(array), {port.name: port for port in array.ports}, driven)
    if simulator == "icarus":
        return simulate_verilog(generate(array), ARRAY, driven, "icarus")
    if simulator == "verilator":
        return simulate_verilog(generate(array), ARRAY, driven, "verilator")
    raise UnknownNameError("simulator", simulator, SIMULATORS)


def array_gates(array: MixedArray, library: Library) -> ArrayReport:
    """Elements, row sums and dequantisers mapped once each, the array joined of them. Raises as `synthesise_array`."""
    return synthesise_array(generate(array), ARRAY, library, (ELEMENT, ROW_SUM, DEQUANTISER))


def verify_gates(array: MixedArray, x: ArrayLike, weights: GroupedWeights, library: Library) -> SimulationResult:
    """Simulate the mapped netlist of the whole array. Raises as `waveforms` and `array_gates`."""
    return simulate_netlist(array_gates(array, library).netlist(library), waveforms(array, x, weights))
