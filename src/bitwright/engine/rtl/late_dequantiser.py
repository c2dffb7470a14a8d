"""Systolic array of mixed-precision elements with a dequantiser per column (MixPE), generated hardware.

Results stay in place while a group of k is summed. Row i of activations x enters at the left i cycles late and passes
a column of row sums first; codes q of column j enter at the top 1 + j cycles late. With the last position of a group
(`last`, given for row 0), an element hands its sum P to a chain that moves up while the next group is summed: row i's
arrives on top 2 i cycles after row 0's, so a group has at least 2 * rows positions. There the column's dequantiser
computes, one value every second cycle, each step two cycles long,

    y[i] = (first group ? 0 : y[i]) + scale * (P - zero * R)

with R, the row's sum, from the column of row sums, one cycle later per column; (scale, zero) of the group from a table
outside. "a8": int8 x, P and R integers, P - zero R exact, then binary32 operations in that order. "a16": FP16 x, exact
products by gated shifted copies of the significand, binary32 sums from the first to the last position.

Source: arXiv 2411.16158; the placement of row sums and chains is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any, Literal

from amaranth.hdl import Cat, ClockSignal, Const, Instance, Module, Mux, Signal, signed, unsigned

from bitwright.core.errors import InputError
from bitwright.engine.rtl import verilog
from bitwright.engine.rtl.arithmetic import Component, Design, rtlil_text
from bitwright.engine.rtl.floating_units import (
    HalfMultiplyAccumulate,
    add_floats,
    float_of_integer,
    multiply_floats,
    single_of_half,
    single_of_scaled,
)

Activations = Literal["a8", "a16"]
Weights = Literal["uint4", "ones", "same"]
ELEMENT, ROW_SUM, DEQUANTISER, ARRAY = "mixed_element", "row_sum", "dequantiser", "mixed_array"
STEP_CYCLES = 2  # of the dequantiser
STEPS = 4  # after its input registers


def activation_bits(activations: Activations) -> int:
    """Bits of an activation word. Raises InputError for other names."""
    if activations not in ("a8", "a16"):
        raise InputError(f"Activations are a8 (int8) or a16 (FP16), not {activations!r}.")
    return 8 if activations == "a8" else 16


def product_bits(activations: Activations, group: int) -> int:
    """Bits of a group's sum P: every sum of int8 x uint4 and P - zero R fits; 32 for FP16."""
    return (1920 * group).bit_length() + 1 if activations == "a8" else 32


def sum_bits(activations: Activations, group: int) -> int:
    """Bits of a row's sum R."""
    return (128 * group - 1).bit_length() + 1 if activations == "a8" else 32


def array_product(module: Module, a: Any, b: Any, a_bits: int, b_bits: int, b_signed: bool = True) -> Any:
    """a * b, signed times signed or unsigned, from one row of gated bits per bit of b, without sign extension: bits are
    inverted where a sign makes them negative, and a constant stands for the inversions.

    Source: Baugh and Wooley, IEEE Transactions on Computers C-22 (1973).
    """
    width, rows, constant = a_bits + b_bits, [], 0
    for i in range(b_bits):
        bits = []
        for j in range(a_bits):
            negative = (j == a_bits - 1) != (b_signed and i == b_bits - 1)
            bits.append(~(a[j] & b[i]) if negative else a[j] & b[i])
            constant -= negative << (i + j)
        rows.append(Cat(*bits) << i)
    word = Signal(signed(width))
    module.d.comb += word.eq(sum(rows, constant % (1 << width))[:width])
    return word


def _held(module: Module, word: Any, name: str, enable: Any = None) -> Any:
    register = Signal.like(word, name=name, reset_less=True)
    if enable is None:
        module.d.sync += register.eq(word)
    else:
        with module.If(enable):
            module.d.sync += register.eq(word)
    return register


class GroupSum(Component):
    """An element of the array: inputs `x`, `q`, `last`, the neighbour's `below` and `below_valid`; outputs the words
    handed on, `x_on`, `q_on`, `last_on`, and the chain `sum` and `valid`.

    `weights`: "uint4"; "ones", a row sum, which has no `q`; "same", weights of the activations' type, the element of an
    ordinary array (for "a16" of normal numbers and zeros). Sums of "a8" have `accumulator_bits`, by default as many as
    a group needs. Raises InputError for fewer.
    """

    def __init__(
        self, activations: Activations, group: int, weights: Weights = "uint4", accumulator_bits: int | None = None
    ) -> None:
        super().__init__()
        self.name = ROW_SUM if weights == "ones" else ELEMENT
        self.activations, self.weights = activations, weights
        bits = (sum_bits if weights == "ones" else product_bits)(activations, group)
        if weights == "same" and activations == "a8":
            bits = (16384 * group).bit_length() + 1
        if accumulator_bits is not None and activations == "a8":
            if accumulator_bits < bits:
                raise InputError(f"{accumulator_bits} accumulator bits do not hold sums of {bits} over {group} rows.")
            bits = accumulator_bits
        word = signed(activation_bits(activations))
        self.form = signed(bits) if activations == "a8" else unsigned(32)
        self.add_input("x", word)
        self.add_output("x_on", word, reset_less=True)
        if weights != "ones":
            self.add_input("q", unsigned(4) if weights == "uint4" else word)
            self.add_output("q_on", unsigned(4) if weights == "uint4" else word, reset_less=True)
        self.add_input("last", unsigned(1))
        self.add_output("last_on", unsigned(1), reset_less=True)
        self.add_input("below", self.form)
        self.add_input("below_valid", unsigned(1))
        self.add_output("sum", self.form, reset_less=True)
        self.add_output("valid", unsigned(1), reset_less=True)

    def _product(self, module: Module, x: Any, q: Any) -> Any:
        if self.activations == "a8":
            if self.weights == "ones":
                return x
            return array_product(module, x, q, 8, len(q), self.weights == "same")
        if self.weights == "same":
            return HalfMultiplyAccumulate().addend(module, {"a": x, "b": q})
        return single_of_half(module, x, q)

    def elaborate(self) -> Module:
        """One product a cycle; the FP16 one is registered before it is added."""
        module, out = Module(), self.outputs
        for name in self.inputs:
            if f"{name}_on" in out:
                module.d.sync += out[f"{name}_on"].eq(self.inputs[name])
        last, total, after = out["last_on"], Signal(self.form, reset_less=True), Signal(self.form)
        addend = self._product(module, out["x_on"], out.get("q_on"))
        if self.activations == "a8":
            module.d.comb += after.eq(total + addend)
        else:
            held = _held(module, addend, "addend")
            last = _held(module, last, "last_held")
            module.d.comb += after.eq(add_floats(module, total, held))
        module.d.sync += [
            total.eq(Mux(last, 0, after)),
            out["sum"].eq(Mux(last, after, self.inputs["below"])),
            out["valid"].eq(last | self.inputs["below_valid"]),
        ]
        return module


class Dequantiser(Component):
    """Inputs `product` (P), `row_sum` (R), `valid`, never in two cycles in a row, `zero` (4 bits), `scale` (FP16,
    positive), `first`; outputs `y` (binary32) and `y_valid`, `latency` cycles later. Holds the totals of `rows` rows,
    which come in turn. Raises InputError for groups whose sums leave 24 bits."""

    name = DEQUANTISER
    latency = 1 + STEPS * STEP_CYCLES

    def __init__(self, activations: Activations, group: int, rows: int) -> None:
        super().__init__()
        bits = product_bits(activations, group)
        if activations == "a8" and bits > 24:
            raise InputError(f"Sums over groups of {group} take {bits} bits; the dequantiser's binary32 holds 24.")
        self.activations, self.rows, self.bits = activations, rows, bits
        whole = activations == "a8"
        self.add_input("product", signed(bits) if whole else unsigned(32))
        self.add_input("row_sum", signed(sum_bits(activations, group)) if whole else unsigned(32))
        self.add_input("valid", unsigned(1))
        self.add_input("zero", unsigned(4))
        self.add_input("scale", unsigned(16))
        self.add_input("first", unsigned(1))
        self.add_output("y", unsigned(32))
        self.add_output("y_valid", unsigned(1), reset_less=True)

    def elaborate(self) -> Module:
        """Shift by the zero point, convert or subtract, scale, add: one register after each, held for two cycles."""
        module = Module()
        valid = [self.inputs["valid"]]
        for step in range(STEPS * STEP_CYCLES):
            valid.append(_held(module, valid[-1], f"valid_{step}"))
        module.d.sync += self.outputs["y_valid"].eq(valid[-1])
        enables = valid[::STEP_CYCLES]
        word = {name: _held(module, port, f"{name}_held", enables[0])
                for name, port in self.inputs.items() if name != "valid"}  # fmt: skip
        scale, first = word["scale"], word["first"]
        if self.activations == "a8":
            gated = sum(Mux(word["zero"][place], word["row_sum"], 0) << place for place in range(4))
            difference = Signal(signed(self.bits))
            module.d.comb += difference.eq(word["product"] - gated)
            difference = _held(module, difference, "difference", enables[1])
            real = _held(module, float_of_integer(module, difference, Const(0, signed(8))), "real", enables[2])
        else:
            zero = single_of_scaled(module, word["zero"], Const(0, signed(2)), 0)
            shift = _held(module, multiply_floats(module, zero, word["row_sum"]), "shift", enables[1])
            product = _held(module, word["product"], "product_late", enables[1])
            real = _held(module, add_floats(module, product, shift ^ (1 << 31)), "real", enables[2])
        single = None
        for step in (1, 2):
            if step == 1:
                single = _held(module, single_of_half(module, scale), "scale_1", enables[1])
            else:
                single = _held(module, single, "scale_2", enables[2])
            first = _held(module, first, f"first_{step}", enables[step])
        scaled = _held(module, multiply_floats(module, single, real), "scaled", enables[3])
        first = _held(module, first, "first_3", enables[3])
        totals = [Signal(unsigned(32), name=f"total_{row}", reset_less=True) for row in range(self.rows)]
        found = add_floats(module, Mux(first, 0, totals[-1])[:32], scaled)
        with module.If(enables[4]):
            module.d.sync += totals[0].eq(found)
            module.d.sync += [after.eq(before) for before, after in pairwise(totals)]
        module.d.comb += self.outputs["y"].eq(totals[0])
        return module


class MixedArray(Component):
    """`rows` x `columns` elements, a column of row sums, a dequantiser per column. Inputs `x_i`, `q_j`, `last`,
    `zero_j`, `scale_j`, `first_j`; outputs `y_j`, `y_valid_j`; timing in the module docstring and `value_cycle`.

    Nothing has a reset: `flush_cycles` of zeros, then one `last`, make every sum zero. With `instances` the parts are
    only referred to by name. Raises InputError for groups shorter than 2 * rows and other extents below 1.
    """

    name = ARRAY

    def __init__(self, activations: Activations, rows: int, columns: int, group: int, instances: bool = False) -> None:
        super().__init__()
        if rows < 1 or columns < 1 or group < 2 * rows:
            raise InputError(
                f"An array of {rows} x {columns} with groups of {group}: expected at least one row and column, and "
                "groups of at least two positions per row, which leave the array one every second cycle."
            )
        self.activations, self.rows, self.columns, self.group = activations, rows, columns, group
        self.instances = instances
        for row in range(rows):
            self.add_input(f"x_{row}", signed(activation_bits(activations)))
        self.add_input("last", unsigned(1))
        for column in range(columns):
            self.add_input(f"q_{column}", unsigned(4))
            self.add_input(f"zero_{column}", unsigned(4))
            self.add_input(f"scale_{column}", unsigned(16))
            self.add_input(f"first_{column}", unsigned(1))
            self.add_output(f"y_{column}", unsigned(32))
            self.add_output(f"y_valid_{column}", unsigned(1))

    @property
    def flush_cycles(self) -> int:
        """Cycles of zeros after which no unknown word is left outside the sums."""
        return 2 * self.rows + self.columns + Dequantiser.latency + 4

    def value_cycle(self, row: int, column: int) -> int:
        """Cycles from the `last` of a group to the cycle in which its P is at the dequantiser."""
        return 3 + (self.activations == "a16") + column + 2 * row

    def parts(self) -> dict[str, Callable[[], Component]]:
        """Makers of the modules that the array is made of, by name."""
        return {
            ELEMENT: lambda: GroupSum(self.activations, self.group),
            ROW_SUM: lambda: GroupSum(self.activations, self.group, "ones"),
            DEQUANTISER: lambda: Dequantiser(self.activations, self.group, self.rows),
        }

    def _place(self, module: Module, name: str, kind: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
        part = self.parts()[kind]()
        if not self.instances:
            module.submodules[name] = Design(part)
            module.d.comb += [part.inputs[port].eq(signal) for port, signal in inputs.items()]
            return part.outputs
        outputs = {port: Signal.like(signal, name=f"{name}_{port}") for port, signal in part.outputs.items()}
        connections: dict[str, Any] = {f"o_{port}": signal for port, signal in outputs.items()}
        for port, signal in inputs.items():
            source = Signal.like(part.inputs[port], name=f"{name}_{port}")
            module.d.comb += source.eq(signal)
            connections[f"i_{port}"] = source
        module.submodules[name] = Instance(part.name, i_clk=ClockSignal(), **connections)
        return outputs

    def elaborate(self) -> Module:
        """Rows from the bottom up, because sums move up."""
        module = Module()
        last = [self.inputs["last"]]
        for row in range(1, self.rows):
            last.append(_held(module, last[-1], f"last_{row}"))
        # words that move down are made before the elements that drive them
        moving = {
            (row, column): Signal(unsigned(4), name=f"q_{row}_{column}")
            for row in range(self.rows + 1) for column in range(self.columns)
        }  # fmt: skip
        for column in range(self.columns):
            module.d.comb += moving[0, column].eq(self.inputs[f"q_{column}"])
        above: dict[int, dict[str, Any]] = {}
        for row in reversed(range(self.rows)):
            inputs = {"x": self.inputs[f"x_{row}"], "last": last[row]}
            for column in range(-1, self.columns):
                chain = above.get(column)
                inputs |= {"below": chain["sum"] if chain else 0, "below_valid": chain["valid"] if chain else 0}
                kind = ROW_SUM if column < 0 else ELEMENT
                if column >= 0:
                    inputs["q"] = moving[row, column]
                made = self._place(module, f"{kind}_{row}_{max(column, 0)}", kind, inputs)
                if column >= 0:
                    module.d.comb += moving[row + 1, column].eq(made["q_on"])
                above[column] = made
                inputs = {"x": made["x_on"], "last": made["last_on"]}
        row_sum = above[-1]["sum"]
        for column in range(self.columns):
            row_sum = _held(module, row_sum, f"row_sum_{column}")
            words = {name: self.inputs[f"{name}_{column}"] for name in ("zero", "scale", "first")}
            words |= {"product": above[column]["sum"], "valid": above[column]["valid"], "row_sum": row_sum}
            made = self._place(module, f"{DEQUANTISER}_{column}", DEQUANTISER, words)
            module.d.comb += [self.outputs[f"{name}_{column}"].eq(made[name]) for name in ("y", "y_valid")]
        return module


def generate(array: MixedArray) -> str:
    """Verilog of the array and its parts. Raises ToolError when Yosys is missing."""
    texts = {name: rtlil_text(make()) for name, make in array.parts().items()}
    whole = MixedArray(array.activations, array.rows, array.columns, array.group, instances=True)
    return verilog(texts | {ARRAY: rtlil_text(whole)})
