"""Arithmetic units on their own, between registers: what a multiplier of a number format costs without an array.

A unit has registered inputs and a registered output (or a register that accumulates products), is mapped with the same
scripts as engines, and simulated as gates against its description in tests. Widths are those of the words, two's
complement unless a format says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from amaranth.hdl import Cat, Module, Mux, Signal, signed, unsigned
from numpy.typing import NDArray

from bitwright.core.errors import InputError
from bitwright.engine.format_products import product_unit
from bitwright.engine.gate_simulation import simulate
from bitwright.engine.liberty import Library
from bitwright.engine.power import PowerReport, activity_power
from bitwright.engine.rtl.arithmetic import Component, rtlil_text
from bitwright.engine.rtl.floating_units import add_encodings
from bitwright.engine.synthesis import GateReport, Objective, synthesise

Circuit = Callable[[Module, Any, Any], Any]


@dataclass(frozen=True)
class Unit:
    """Two input words of so many bits, a result of `result_bits`, and the logic between. With `accumulator_bits` the
    result is added to a register of that width instead of being kept."""

    name: str
    a_bits: int
    b_bits: int
    result_bits: int
    circuit: Circuit
    accumulator_bits: int = 0

    def accumulating(self, bits: int = 32) -> Unit:
        """The same with an accumulator. Raises InputError for one narrower than the result."""
        if bits < self.result_bits:
            raise InputError(f"{self.name}: {bits} accumulator bits do not hold a result of {self.result_bits}.")
        return Unit(f"{self.name}, accumulating", self.a_bits, self.b_bits, self.result_bits, self.circuit, bits)


class _Registered(Component):
    name = "unit"

    def __init__(self, unit: Unit, registers: bool) -> None:
        super().__init__()
        self.unit, self.registers = unit, registers
        self.add_input("a", signed(unit.a_bits))
        self.add_input("b", signed(unit.b_bits))
        self.add_output("result", signed(unit.accumulator_bits or unit.result_bits), reset_less=True)

    def elaborate(self) -> Module:
        """Input registers, logic, output register or accumulator."""
        module, result = Module(), self.outputs["result"]
        words = []
        for name in ("a", "b"):
            word = self.inputs[name]
            if self.registers:
                held = Signal.like(word, name=f"{name}_held", reset_less=True)
                module.d.sync += held.eq(word)
                word = held
            words.append(word)
        found = self.unit.circuit(module, *words)
        if self.unit.accumulator_bits:
            module.d.sync += result.eq(result + found)
        elif self.registers:
            module.d.sync += result.eq(found)
        else:
            module.d.comb += result.eq(found)
        return module


def unit_gates(unit: Unit | Component, library: Library, objective: Objective = "area_delay") -> GateReport:
    """Map a unit between registers, or a component that has its own. Raises as `synthesis.synthesise`."""
    component = _Registered(unit, True) if isinstance(unit, Unit) else unit
    return synthesise(rtlil_text(component), component.name, library, objective)


def unit_power(
    unit: Unit | Component,
    library: Library,
    drive: Mapping[str, NDArray[np.int64]],
    objective: Objective = "area_delay",
) -> PowerReport:
    """Energy per cycle, registers included, of what `unit_gates` maps, at its own period; activity simulated.

    `drive`: words of every input port (cycles, streams), one operation per cycle. Raises as `synthesis.synthesise`
    and `gate_simulation.simulate`.
    """
    report = unit_gates(unit, library, objective)
    netlist = report.netlist(library)
    simulation = simulate(netlist, drive)
    return activity_power(netlist, simulation.toggles, simulation.intervals, report.period_s or report.longest_path_s)


def logic_gates(unit: Unit, library: Library) -> GateReport:
    """Map its logic alone, for simulation. Raises InputError for an accumulating unit."""
    if unit.accumulator_bits:
        raise InputError(f"{unit.name} has a register; take the unit without an accumulator.")
    return synthesise(rtlil_text(_Registered(unit, False)), "unit", library)


def product(name: str) -> Unit:
    """The product of number-format codes of `engine.format_products`."""
    found = product_unit(name)
    return Unit(name, found.a_bits, found.b_bits, found.product_bits, found.circuit)


def integer_multiplier(a_bits: int, b_bits: int) -> Unit:
    """A signed product left to the synthesis tool."""
    return Unit(f"int{a_bits} x int{b_bits}", a_bits, b_bits, a_bits + b_bits, lambda module, a, b: a * b)


def _fields(word: Any, exponent_bits: int, mantissa_bits: int) -> tuple[Any, Any, Any]:
    top = exponent_bits + mantissa_bits
    return word[:mantissa_bits], word[mantissa_bits:top], word[top]


def float_multiplier(exponent_bits: int, mantissa_bits: int) -> Unit:
    """A truncating product of normal floating-point numbers; no rounding, no subnormals, no special values.

    Exponents wrap, as in a unit that leaves ranges to its surroundings: the cheapest honest multiplier.
    """
    bits, bias = 1 + exponent_bits + mantissa_bits, (1 << (exponent_bits - 1)) - 1

    def circuit(module: Module, a: Any, b: Any) -> Any:
        (m_a, e_a, s_a), (m_b, e_b, s_b) = (_fields(word, exponent_bits, mantissa_bits) for word in (a, b))
        wide = Signal(unsigned(2 * mantissa_bits + 2))
        module.d.comb += wide.eq(Cat(m_a, 1) * Cat(m_b, 1))
        carry = wide[2 * mantissa_bits + 1]
        fraction = Mux(carry, wide[mantissa_bits + 1 : 2 * mantissa_bits + 1], wide[mantissa_bits : 2 * mantissa_bits])
        exponent = Signal(unsigned(exponent_bits))
        module.d.comb += exponent.eq(e_a + e_b - bias + carry)
        return Cat(fraction[:mantissa_bits], exponent, s_a ^ s_b).as_signed()

    return Unit(f"float e{exponent_bits}m{mantissa_bits} product", bits, bits, bits, circuit)


def logarithmic_multiplier(
    exponent_bits: int, mantissa_bits: int, saturates: bool, largest_code: int, checks_range: bool = True
) -> Unit:
    """L-Mul, adder form (arXiv 2410.00907): encodings are added; zero and subnormal operands and small results give
    zero, large ones `largest_code` (or, where the format has infinity, the code above it).

    Without `checks_range` results out of range wrap, as those of `float_multiplier` do; zero operands still give zero.
    """
    bits = 1 + exponent_bits + mantissa_bits

    def circuit(module: Module, a: Any, b: Any) -> Any:
        word = add_encodings(module, a, b, exponent_bits, mantissa_bits, saturates, largest_code, checks_range)
        return word.as_signed()

    return Unit(f"L-Mul e{exponent_bits}m{mantissa_bits}", bits, bits, bits, circuit)


def half_by_uint4() -> Unit:
    """FP16 times an unsigned 4-bit integer, exact (arXiv 2411.16158, W4A16): the 11-bit significand as four gated
    shifted copies, then one normalisation.

    Input b is the integer. The result is sign, 6-bit exponent field and 14-bit fraction (21 bits): exponent e stands
    for 2^(e - 15), 0 for numbers without a hidden bit, in steps of 2^-28; 63 marks infinity and NaN, passed through
    unless the integer is zero.
    """

    def circuit(module: Module, a: Any, b: Any) -> Any:
        mantissa, exponent, sign = _fields(a, 5, 10)
        normal = exponent.any()
        significand = Cat(mantissa, normal)
        wide = Signal(unsigned(15))
        module.d.comb += wide.eq(sum(Mux(b[place], significand, 0) << place for place in range(4)))
        # the leading one of a normal number's product is at bit 10 to 14
        top = Signal(unsigned(3))
        module.d.comb += top.eq(Mux(wide[14], 4, Mux(wide[13], 3, Mux(wide[12], 2, Mux(wide[11], 1, 0)))))
        lead = wide[10:15].any()
        fraction = Signal(unsigned(14))
        aligned = wide << 4
        for place in range(11, 15):
            aligned = Mux(wide[place], wide << (14 - place), aligned)
        module.d.comb += fraction.eq(aligned)
        special = exponent == 31
        field = Signal(unsigned(6))
        base = Mux(normal, exponent, 1)
        module.d.comb += field.eq(Mux(special, 63, Mux(lead, base + top, 0)))
        zero = ~b[:4].any()
        return Mux(zero, 0, Cat(Mux(special, Cat(0, 0, 0, 0, mantissa), fraction)[:14], field, sign)).as_signed()

    return Unit("fp16 x uint4", 16, 4, 21, circuit)


def half_by_uint4_value(word: int) -> float:
    """What a result word of `half_by_uint4` means; NaN where its fraction is not zero at exponent 63."""
    fraction, exponent, negative = word & 0x3FFF, (word >> 14) & 63, word >> 20 & 1
    if exponent == 63:
        value = float("nan") if fraction else float("inf")
    elif exponent:
        value = (1 + fraction / (1 << 14)) * 2.0 ** (exponent - 15)
    else:
        value = fraction * 2.0**-28
    return -value if negative else value
