"""Hardware of outlier-victim pairs: the decoder at the border of an array, and an array that reads packed pairs.

A decoder takes one pair of codes and gives two words, an unsigned exponent above a signed integer of `bits` bits:
normal values <0, code> (flint: the exponent of its leading one), outliers <exponent + bias, +-(2^m + mantissa)>,
victims <0, 0>. Words of 4-bit pairs are those of the product unit "ovp4". The integer of an 8-bit word is its two 4-bit
halves, <4 + e, h> and <e, l>, without any logic. Pairs of two victims, which no encoder makes, decode to zeros.

The array is output stationary: bytes enter at n + m decoders on two sides, words travel one element per cycle, and
every element adds two products per cycle, so that an array of n x m needs n + m decoders instead of n * m.

Source: arXiv 2304.07493 (ISCA 2023), section on the OliVe architecture.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from amaranth.hdl import Cat, Module, Mux, Signal, signed, unsigned
from numpy.typing import NDArray

from bitwright.arithmetic.formats.outlier_victim import OutlierVictimPairs
from bitwright.core.errors import InputError
from bitwright.engine.format_products import product_unit
from bitwright.engine.liberty import Library
from bitwright.engine.rtl import verilog
from bitwright.engine.rtl.arithmetic import Component, Design, rtlil_text
from bitwright.engine.synthesis import GateReport, synthesise
from bitwright.engine.testbench import CompiledSimulator, SimulationResult, simulate_amaranth, simulate_verilog
from bitwright.engine.waveforms import Waveforms

DECODER, ARRAY = "outlier_victim_decoder", "outlier_victim_array"


def exponent_bits(form: OutlierVictimPairs) -> int:
    """Bits of a word's exponent; 3 for 4-bit pairs, whose words are those of "ovp4".

    Raises InputError for unsigned pairs, which have no decoder in hardware.
    """
    if not form.signed:
        raise InputError(f"{form.name}: the decoder is that of signed pairs; unsigned ones run in software only.")
    used = form.outliers[(form.outliers > 0) & (form.outliers <= form.largest)]
    highest = (int(used.max()).bit_length() - 1) - form.mantissa_bits
    return max(3, highest.bit_length())


def expected_words(form: OutlierVictimPairs, codes: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Words (unsigned readings) that the decoder gives for codes (..., even k)."""
    exponent, integer = form.exponent_integers(codes)[-1]
    if form.bits == 8:
        integer = integer + (form.exponent_integers(codes)[0][1] << 4)
    return np.asarray(((exponent & ((1 << exponent_bits(form)) - 1)) << form.bits) | (integer & ((1 << form.bits) - 1)))


def decode_pair(module: Module, form: OutlierVictimPairs, pair: Any, name: str = "") -> tuple[Any, Any]:
    """Words of the left code (the low bits of `pair`) and of the right one."""
    left, right = pair[: form.bits], pair[form.bits :]
    victims = []
    for side, code in (("left", left), ("right", right)):
        victim = Signal(name=f"{name}{side}_victim")
        module.d.comb += victim.eq(code == form.identifier)
        victims.append(victim)
    return (
        _word(module, form, left, victims[0], victims[1], f"{name}left"),
        _word(module, form, right, victims[1], victims[0], f"{name}right"),
    )


def _word(module: Module, form: OutlierVictimPairs, code: Any, victim: Any, outlier: Any, name: str) -> Any:
    bits, m = form.bits, form.mantissa_bits
    magnitude, sign = code[: bits - 1], code[bits - 1]
    exponent = Signal(unsigned(exponent_bits(form)), name=f"{name}_exponent")
    integer = Signal(signed(bits), name=f"{name}_integer")
    magnitude_word = Signal(unsigned(bits - 1), name=f"{name}_significand")
    zero, used = Signal(name=f"{name}_zero"), magnitude.any()
    signed_word = Mux(sign, -magnitude_word, magnitude_word)
    if form.normal == "flint":
        normal, place = _flint(code)
        significand, plain = Mux(outlier, Cat(magnitude[:m], 1), normal), signed_word
    else:
        significand, plain, place = Cat(magnitude[:m], 1), code.as_signed(), 0
    module.d.comb += [
        zero.eq(victim | (outlier & ~used)),
        magnitude_word.eq(significand),
        exponent.eq(Mux(zero, 0, Mux(outlier, magnitude[m:] + form.shift, place))),
        integer.eq(Mux(zero, 0, Mux(outlier, signed_word, plain))),
    ]
    return Cat(integer, exponent)


def _flint(code: Any) -> tuple[Any, Any]:
    """Significand and exponent of a 4-bit flint code: 0xx is 0 to 3, 11x is (2 + x) << 1, 101 is 1 << 3, 100 1 << 4."""
    plain = Cat(code[0], code[1], 0)
    pair = Cat(code[0], 1, 0)
    significand = Mux(code[2], Mux(code[1], pair, 1), plain)
    return significand, Mux(code[2], Mux(code[1], 1, Mux(code[0], 3, 4)), 0)


class Decoder(Component):
    """Input `pair`, one pair of codes, the left one below; outputs `left` and `right`, their words."""

    name = DECODER

    def __init__(self, form: OutlierVictimPairs) -> None:
        super().__init__()
        self.form = form
        self.add_input("pair", unsigned(2 * form.bits))
        for side in ("left", "right"):
            self.add_output(side, unsigned(form.bits + exponent_bits(form)))

    def elaborate(self) -> Module:
        """Combinational."""
        module = Module()
        for side, word in zip(("left", "right"), decode_pair(module, self.form, self.inputs["pair"]), strict=True):
            module.d.comb += self.outputs[side].eq(word)
        return module


class PairArray(Component):
    """`rows` x `columns` multiply-accumulate elements behind decoders of outlier-victim pairs at its border.

    Inputs `a_i` and `b_j`, one byte of a row of A and of B (n, k) per cycle, row i and column j delayed by i and j
    cycles; outputs `sum_i_j`, cleared by the reset. Raises InputError for 8-bit pairs and accumulators below 15 bits,
    which hold no product.
    """

    name = ARRAY

    def __init__(self, form: OutlierVictimPairs, rows: int, columns: int, accumulator_bits: int = 32) -> None:
        super().__init__()
        if form.operand is None or accumulator_bits < product_unit(form.operand).product_bits:
            raise InputError(f"{form.name} with {accumulator_bits} accumulator bits: the array takes 4-bit pairs and "
                             "sums that hold one product.")  # fmt: skip
        self.form, self.rows, self.columns, self.accumulator_bits = form, rows, columns, accumulator_bits
        for side, count in (("a", rows), ("b", columns)):
            for at in range(count):
                self.add_input(f"{side}_{at}", unsigned(8))
        for i in range(rows):
            for j in range(columns):
                self.add_output(f"sum_{i}_{j}", signed(accumulator_bits))

    def elaborate(self) -> Module:
        """Decoders and registers at the border, then elements that hand words on."""
        module, unit = Module(), product_unit("ovp4")
        moving: dict[tuple[str, int], list[Any]] = {}
        for side, count in (("a", self.rows), ("b", self.columns)):
            for at in range(count):
                words = decode_pair(module, self.form, self.inputs[f"{side}_{at}"], f"{side}_{at}_")
                moving[side, at] = [self._held(module, word, f"{side}_{at}_{half}") for half, word in enumerate(words)]
        for i in range(self.rows):
            for j in range(self.columns):
                total, row, column = self.outputs[f"sum_{i}_{j}"], moving["a", i], moving["b", j]
                products = [unit.circuit(module, x, y) for x, y in zip(row, column, strict=True)]
                module.d.sync += total.eq(total + products[0] + products[1])
                moving["a", i] = [self._held(module, x, f"a_{i}_{j}_{half}_on") for half, x in enumerate(row)]
                moving["b", j] = [self._held(module, x, f"b_{i}_{j}_{half}_on") for half, x in enumerate(column)]
        return module

    @staticmethod
    def _held(module: Module, word: Any, name: str) -> Any:
        register = Signal(unsigned(7), name=name)
        module.d.sync += register.eq(word)
        return register


def _simulate(component: Component, waveforms: Waveforms, simulator: str) -> SimulationResult:
    if simulator == "amaranth":
        ports = {port.name: port for port in component.ports}
        return simulate_amaranth(Design(component), ports, waveforms)
    compiled: CompiledSimulator = "verilator" if simulator == "verilator" else "icarus"
    text = verilog({component.name: rtlil_text(component, resettable=bool(waveforms.reset))})
    return simulate_verilog(text, component.name, waveforms, compiled)


def verify_decoder(form: OutlierVictimPairs, simulator: str = "amaranth") -> SimulationResult:
    """Every pair of codes (all 256 bytes for 4 bits) but two victims, through the generated decoder.

    `simulator`: amaranth, icarus, verilator. Raises ToolError when it is missing or fails.
    """
    every = np.arange(1 << (2 * form.bits))
    codes = np.stack([every & ((1 << form.bits) - 1), every >> form.bits], axis=1).astype(np.uint8)
    legal = ~(codes == form.identifier).all(axis=1)
    legal &= (np.abs(form.outliers[codes]) <= form.largest).all(axis=1) | ~(codes == form.identifier).any(axis=1)
    words = expected_words(form, codes[legal])
    component = Decoder(form)
    widths = {name: len(port) for name, port in (component.inputs | component.outputs).items()}
    expected = {"left": words[:, 0], "right": words[:, 1]}
    driven = Waveforms({"pair": every[legal]}, expected, {}, widths, 0, "", "")
    return _simulate(component, driven, simulator)


def verify_array(
    form: OutlierVictimPairs, a: NDArray[np.uint8], b: NDArray[np.uint8], simulator: str = "amaranth"
) -> SimulationResult:
    """Packed pairs a (rows, k/2) and b (columns, k/2) through an array of that size: its sums against int64 products
    of the values. Raises as `verify_decoder`, and InputError for different lengths and pairs of two victims."""
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise InputError(f"Packed pairs (rows, bytes) and (columns, bytes) asked for; got {a.shape} and {b.shape}.")
    values = [form.integers(np.stack([x & 15, x >> 4], axis=-1).reshape(len(x), -1)) for x in (a, b)]
    product = values[0] @ values[1].T
    component = PairArray(form, len(a), len(b))
    cycles = a.shape[1] + len(a) + len(b) + 1
    inputs = {}
    for side, packed in (("a", a), ("b", b)):
        for at, row in enumerate(packed):
            inputs[f"{side}_{at}"] = np.pad(row.astype(np.int64), (at, cycles - at - len(row)))
    last = np.arange(cycles) == cycles - 1
    names = [(f"sum_{i}_{j}", product[i, j]) for i in range(len(a)) for j in range(len(b))]
    widths = {name: len(port) for name, port in (component.inputs | component.outputs).items()}
    driven = Waveforms(inputs, {name: np.where(last, value, 0) for name, value in names},
                       dict.fromkeys((name for name, _ in names), last), widths, 1)  # fmt: skip
    return _simulate(component, driven, simulator)


def decoder_gates(form: OutlierVictimPairs, library: Library) -> GateReport:
    """The decoder mapped to cells. Raises as `synthesis.synthesise`."""
    return synthesise(rtlil_text(Decoder(form)), DECODER, library, "area")
