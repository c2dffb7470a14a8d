"""Multipliers for comparisons of mixed-precision elements like with like (arXiv 2411.16158).

A ratio of two multipliers depends on how both are built. `engine.standalone_units` leaves a signed product to the
synthesis tool, which extends the sign of every partial product; here partial products are written without sign
extension (Baugh and Wooley; modified Booth), for 8-bit and for 4-bit operands alike, and an accumulator may be kept
apart from the multiplier. `half_by_uint4_normal` and `half_by_uint4_truncating` leave out what the truncating FP16
multiplier of `standalone_units.float_multiplier` leaves out too.
"""

from __future__ import annotations

from typing import Any

from amaranth.hdl import Cat, Instance, Module, Mux, Signal, signed, unsigned

from bitwright.core.errors import InputError
from bitwright.engine.liberty import Library
from bitwright.engine.rtl import verilog
from bitwright.engine.rtl.arithmetic import Component, rtlil_text
from bitwright.engine.rtl.late_dequantiser import array_product
from bitwright.engine.standalone_units import Unit
from bitwright.engine.synthesis import ArrayReport, synthesise_array


def array_multiplier(a_bits: int = 8, b_bits: int = 8, b_signed: bool = True) -> Unit:
    """Signed times signed or unsigned words: one row of gated bits per bit of b, inverted where a sign bit makes a
    partial product negative, and a constant for the inversions. Source: Baugh and Wooley, IEEE Transactions on
    Computers C-22 (1973)."""

    def circuit(module: Module, a: Any, b: Any) -> Any:
        return array_product(module, a, b, a_bits, b_bits, b_signed)

    kind = "int" if b_signed else "uint"
    return Unit(f"int{a_bits} x {kind}{b_bits}, gated rows", a_bits, b_bits, a_bits + b_bits, circuit)


def booth_multiplier(bits: int = 8) -> Unit:
    """Signed words of an even number of bits: a row per two bits of b, one of -2a, -a, 0, a, 2a, without sign
    extension. Source: MacSorley, Proceedings of the IRE 49 (1961). Raises InputError for an odd number."""
    if bits < 2 or bits % 2:
        raise InputError(f"Radix-4 Booth digits take two bits each; got a word of {bits}.")

    def circuit(module: Module, a: Any, b: Any) -> Any:
        rows, constant = [], 0
        extended, double = Cat(a[:bits], a[bits - 1]), Cat(0, a[:bits])
        for i in range(bits // 2):
            high, middle, low = b[2 * i + 1], b[2 * i], b[2 * i - 1] if i else 0
            one = middle ^ low
            two = Mux(high, ~middle & ~low, middle & low)
            row = (Mux(one, extended, 0) | Mux(two, double, 0)) ^ Mux(high, (1 << (bits + 1)) - 1, 0)
            rows.append(Cat(row[:bits], ~row[bits]) << 2 * i)
            rows.append(Cat(high) << 2 * i)
            constant -= 1 << (bits + 2 * i)
        return _low_bits(module, sum(rows, constant % (1 << (2 * bits))), 2 * bits)

    return Unit(f"int{bits} x int{bits}, Booth", bits, bits, 2 * bits, circuit)


def _low_bits(module: Module, total: Any, width: int) -> Any:
    word = Signal(signed(width))
    module.d.comb += word.eq(total[:width])
    return word


def half_by_uint4_normal() -> Unit:
    """`standalone_units.half_by_uint4` for normal FP16 numbers: no subnormals, infinities or NaN; exact.

    The result has a sign, a 6-bit exponent field and 14 fraction bits; zero where the integer is zero.
    """
    return Unit("fp16 x uint4, normal numbers", 16, 4, 21, lambda module, a, b: _half_by_uint4(module, a, b, 14))


def half_by_uint4_truncating() -> Unit:
    """The same with an FP16 result: 10 fraction bits, truncated, a 5-bit exponent that wraps, as the results of
    `standalone_units.float_multiplier` do."""
    return Unit("fp16 x uint4, truncating", 16, 4, 16, lambda module, a, b: _half_by_uint4(module, a, b, 10))


def _half_by_uint4(module: Module, a: Any, b: Any, fraction_bits: int) -> Any:
    """The integer is normalised first, to 8 .. 15: its top bit gates nothing, and the product of it and a significand
    of 1024 .. 2047 has its leading one at one of two places, as that of two significands does."""
    normalised = Mux(b[3], b[:4], Mux(b[2], Cat(0, b[:3]), Mux(b[1], Cat(0, 0, b[:2]), 8)))
    place = Cat(b[3] | (b[1] & ~b[2]), b[3] | b[2])
    factor, wide = Signal(unsigned(4)), Signal(unsigned(15))
    significand = Cat(a[:10], 1)
    module.d.comb += factor.eq(normalised)
    rows = [Mux(factor[at], significand, 0) << at for at in range(3)]
    module.d.comb += wide.eq(sum(rows, significand << 3))
    carry = wide[14]
    fraction = Mux(carry, wide[:14], Cat(0, wide[:13]))
    field = Signal(unsigned(6 if fraction_bits == 14 else 5))
    module.d.comb += field.eq(a[10:15] + place + carry)
    return Mux(b[:4].any(), Cat(fraction[14 - fraction_bits : 14], field, a[15]), 0).as_signed()


class _Product(Component):
    name = "product"

    def __init__(self, unit: Unit) -> None:
        super().__init__()
        self.unit = unit
        self.add_input("a", signed(unit.a_bits))
        self.add_input("b", signed(unit.b_bits))
        self.add_output("result", signed(unit.result_bits))

    def elaborate(self) -> Module:
        module = Module()
        module.d.comb += self.outputs["result"].eq(self.unit.circuit(module, self.inputs["a"], self.inputs["b"]))
        return module


class _AccumulatorApart(Component):
    name = "mac"

    def __init__(self, unit: Unit, bits: int) -> None:
        super().__init__()
        self.unit = unit
        self.add_input("a", signed(unit.a_bits))
        self.add_input("b", signed(unit.b_bits))
        self.add_output("result", signed(bits), reset_less=True)

    def elaborate(self) -> Module:
        module, held = Module(), {}
        for name, port in self.inputs.items():
            held[name] = Signal.like(port, name=f"{name}_held", reset_less=True)
            module.d.sync += held[name].eq(port)
        product = Signal(signed(self.unit.result_bits), name="product_word")
        module.submodules.product = Instance(_Product.name, i_a=held["a"], i_b=held["b"], o_result=product)
        module.d.sync += self.outputs["result"].eq(self.outputs["result"] + product)
        return module


def accumulating_apart(unit: Unit, library: Library, bits: int = 32) -> ArrayReport:
    """Gates of input registers, the unit mapped on its own, and an adder with an accumulator behind it.

    Synthesis cannot merge the last addition of the product with that of the accumulator, as it does in
    `Unit.accumulating`. Raises InputError for an accumulator narrower than the result, and as `synthesise_array`.
    """
    if unit.accumulator_bits or bits < unit.result_bits:
        raise InputError(f"{unit.name}: expected a unit without accumulator and {unit.result_bits} bits or more.")
    parts = {
        _Product.name: rtlil_text(_Product(unit)),
        _AccumulatorApart.name: rtlil_text(_AccumulatorApart(unit, bits)),
    }
    return synthesise_array(verilog(parts), _AccumulatorApart.name, library, (_Product.name,))
