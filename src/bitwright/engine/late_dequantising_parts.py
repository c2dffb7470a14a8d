"""Figures of the parts of a mixed-precision array, from gates: area, energy busy and idle, period.

Every part is the smallest mapping that meets the clock of the comparison. Energies come from simulated activity of
random words and include leakage; see `engine.power` for what they leave out. The parts are those of
`rtl.late_dequantiser`; an ordinary array has `GroupSum(weights="same")` elements.
"""

from __future__ import annotations

import numpy as np
from amaranth.hdl import Cat, Module, Mux, unsigned
from numpy.typing import NDArray

from bitwright.core.errors import InputError
from bitwright.engine.gate_simulation import simulate
from bitwright.engine.late_dequantising_array import ArrayFigures, PartFigures
from bitwright.engine.liberty import Library
from bitwright.engine.power import activity_power
from bitwright.engine.rtl.arithmetic import Component, rtlil_text
from bitwright.engine.rtl.floating_units import _register, _rounded, _signal, single_of_half
from bitwright.engine.rtl.late_dequantiser import (
    STEP_CYCLES,
    Activations,
    Dequantiser,
    GroupSum,
    activation_bits,
    product_bits,
    sum_bits,
)
from bitwright.engine.synthesis import synthesise

CYCLES, STREAMS = 256, 64


class WeightExpander(Component):
    """Dequantisation before the array: input `q`, `zero`, `scale` (FP16, normal); output `weight`, the FP16 number
    nearest to scale * (q - zero), ties to even, magnitudes below normal numbers as zero, above as infinity."""

    name = "weight_expander"

    def __init__(self) -> None:
        super().__init__()
        self.add_input("q", unsigned(4))
        self.add_input("zero", unsigned(4))
        self.add_input("scale", unsigned(16))
        self.add_output("weight", unsigned(16), reset_less=True)

    def elaborate(self) -> Module:
        """A product of 11 and 4 bits, normalised and rounded."""
        module = Module()
        word = {name: _register(module, port.shape(), port) for name, port in self.inputs.items()}
        difference = _signal(module, 5, word["q"] - word["zero"])
        negative = difference[4]
        magnitude = _signal(module, unsigned(4), Mux(negative, -difference, difference)[:4])
        single = single_of_half(module, word["scale"], magnitude)
        field = _signal(module, 10, single[23:31] - 112)
        code = _signal(module, unsigned(15), _rounded(module, Cat(single[13:23], field[:5]), single[:13]))
        small, large = (single[23:31] < 113), (single[23:31] > 142)
        found = Mux(small, 0, Mux(large, 31 << 10, code))
        module.d.sync += self.outputs["weight"].eq(Cat(found[:15], negative & ~small))
        return module


def _figures(part: Component, library: Library, clock_hz: float, busy: dict[str, NDArray[np.int64]],
             idle: dict[str, NDArray[np.int64]], cycles: int = 1) -> PartFigures:  # fmt: skip
    """The smallest mapping whose paths take `cycles` clock cycles at most. One of so many busy cycles counts as busy,
    the others as idle."""
    report = synthesise(rtlil_text(part), part.name, library, "area", within_s=cycles / clock_hz)
    netlist = report.netlist(library)
    energies = []
    for drive in (busy, idle):
        result = simulate(netlist, drive)
        power = activity_power(netlist, result.toggles, result.intervals, 1 / clock_hz)
        energies.append(power.power_w / clock_hz)
    working = cycles * energies[0] - (cycles - 1) * energies[1]
    return PartFigures(report.area_um2, working, energies[1], report.longest_path_s / cycles)


def _drive(
    part: Component, rng: np.random.Generator, words: dict[str, NDArray[np.int64]]
) -> dict[str, NDArray[np.int64]]:
    shape = (CYCLES, STREAMS)
    return {name: words.get(name, rng.integers(0, 1 << len(port), shape)) for name, port in part.inputs.items()}


def _activations(activations: Activations, rng: np.random.Generator) -> NDArray[np.int64]:
    shape = (CYCLES, STREAMS)
    if activations == "a8":
        return np.clip(np.rint(rng.normal(0, 26, shape)), -127, 127).astype(np.int64)  # 127 at the largest of 2^20
    return rng.normal(0, 1, shape).astype(np.float16).view(np.int16).astype(np.int64)


def element_figures(part: GroupSum, library: Library, clock_hz: float) -> PartFigures:
    """An element or row sum on normal activations and weights, a group ending in every 128th cycle."""
    rng, shape = np.random.default_rng(0), (CYCLES, STREAMS)
    ends = np.zeros(shape, np.int64)
    ends[127::128] = 1
    words = {"x": _activations(part.activations, rng), "last": ends, "below": np.zeros(shape, np.int64),
             "below_valid": np.zeros(shape, np.int64)}  # fmt: skip
    if part.weights == "uint4":
        words["q"] = np.clip(np.rint(rng.normal(7.5, 3, shape)), 0, 15).astype(np.int64)
    elif part.weights == "same":
        words["q"] = _activations(part.activations, rng)
    idle = {name: np.zeros(shape, np.int64) for name in part.inputs}
    return _figures(part, library, clock_hz, words, idle)


def dequantiser_figures(part: Dequantiser, group: int, library: Library, clock_hz: float) -> PartFigures:
    """A dequantiser that takes a value in every second cycle; busy energy is per value."""
    rng, shape = np.random.default_rng(0), (CYCLES, STREAMS)
    valid = np.zeros(shape, np.int64)
    valid[::STEP_CYCLES] = 1
    spread = group**0.5
    if part.activations == "a8":
        product = rng.normal(0, 26 * 8 * spread, shape).astype(np.int64)
        row_sum = np.clip(rng.normal(0, 26 * spread, shape), *_range(sum_bits("a8", group))).astype(np.int64)
        product = np.clip(product, *_range(product_bits("a8", group)))
    else:
        product, row_sum = (rng.normal(0, width * spread, shape).astype(np.float32).view(np.int32).astype(np.int64)
                            for width in (8, 1))  # fmt: skip
    words = {"product": product, "row_sum": row_sum, "valid": valid, "first": np.zeros(shape, np.int64),
             "zero": np.full(shape, 8), "scale": np.full(shape, int(np.float16(0.01).view(np.uint16)))}  # fmt: skip
    idle = _drive(part, rng, {**words, "valid": np.zeros(shape, np.int64)})
    return _figures(part, library, clock_hz, _drive(part, rng, words), idle, STEP_CYCLES)


def _range(bits: int) -> tuple[int, int]:
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


def expander_figures(library: Library, clock_hz: float) -> PartFigures:
    """A dequantiser before the array, a weight in every cycle."""
    rng, shape, part = np.random.default_rng(0), (CYCLES, STREAMS), WeightExpander()
    words = {"q": np.clip(np.rint(rng.normal(7.5, 3, shape)), 0, 15).astype(np.int64), "zero": np.full(shape, 8),
             "scale": np.full(shape, int(np.float16(0.01).view(np.uint16)))}  # fmt: skip
    idle = {name: np.zeros(shape, np.int64) for name in words}
    return _figures(part, library, clock_hz, words, idle)


def array_figures(
    name: str, library: Library, clock_hz: float, rows: int = 32, columns: int = 32, group: int = 128,
    accumulator_bits: int | None = 32,
) -> ArrayFigures:  # fmt: skip
    """MixPE-A8, MixPE-A16, or an ordinary array: INT8 (W8A8), FP16 (W16A16), FP16-W4 (stored in 4 bits, expanded before
    the array), INT8-W4 (stored in 4 bits, code less zero point multiplied as int8, the dequantisers of MixPE-A8 for the
    scales; the subtractor is not charged). `accumulator_bits` of the int8 elements, None: as many as the sums need.

    Raises InputError for other names and as `synthesise`.
    """
    kinds: dict[str, Activations] = {
        "MixPE-A8": "a8",
        "INT8": "a8",
        "INT8-W4": "a8",
        "MixPE-A16": "a16",
        "FP16": "a16",
        "FP16-W4": "a16",
    }
    if name not in kinds:
        raise InputError(f"Arrays are {', '.join(kinds)}, not {name!r}.")
    act = kinds[name]
    bits = activation_bits(act)
    if name.startswith("MixPE"):
        unit = Dequantiser(act, group, rows)
        return ArrayFigures(
            name, "late", rows, columns, clock_hz,
            element_figures(GroupSum(act, group, "uint4", accumulator_bits), library, clock_hz),
            dequantiser_figures(unit, group, library, clock_hz),
            element_figures(GroupSum(act, group, "ones"), library, clock_hz), 4, bits, 16, 20, group,
        )  # fmt: skip
    if name == "INT8-W4":
        return ArrayFigures(
            name, "late", rows, columns, clock_hz,
            element_figures(GroupSum(act, group, "same", accumulator_bits), library, clock_hz),
            dequantiser_figures(Dequantiser(act, group, rows), group, library, clock_hz), group=group,
        )  # fmt: skip
    element = element_figures(GroupSum(act, group, "same", accumulator_bits), library, clock_hz)
    if name == "FP16-W4":
        return ArrayFigures(name, "early", rows, columns, clock_hz, element, expander_figures(library, clock_hz),
                            weight_bits=4, activation_bits=bits, group=group)  # fmt: skip
    return ArrayFigures(name, "none", rows, columns, clock_hz, element, weight_bits=bits, activation_bits=bits,
                        scale_bits=0, group=group)  # fmt: skip
