"""Hardware of nest bodies: every primitive as logic of an Amaranth module, and modules with named ports."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from amaranth.back import rtlil
from amaranth.hdl import Cat, ClockDomain, Elaboratable, Module, Mux, Signal, signed, unsigned

from bitwright.core.errors import InputError
from bitwright.engine.encoder_hardware import (
    code_bits,
    encode_digit,
    flip_top_bit,
    negate,
    select_inverted,
    select_issued_inverted,
    select_issued_multiple,
    select_multiple,
)
from bitwright.engine.format_products import product_unit
from bitwright.engine.nest import Nest, Operation, Primitive, Statement, Value, Words, reduce_to_two, walk


def shape(value: Value) -> Any:
    """The Amaranth shape of a word."""
    return signed(value.bits) if value.signed else unsigned(value.bits)


def label(name: str, key: Sequence[int] = ()) -> str:
    """Name of one element of a replicated value: m, m_0, m_2_1."""
    return "_".join([name, *map(str, key)])


def choose(index: Any, choices: Sequence[Any]) -> Any:
    """The choice at `index`: a tree of two-way multiplexers, one level per bit."""
    level = list(choices)
    for bit in range(len(index)):
        level = [
            Mux(index[bit], level[at + 1], level[at]) if at + 1 < len(level) else level[at]
            for at in range(0, len(level), 2)
        ]
    return level[0]


def _read_as(word: Any, value: Value) -> Any:
    return word.as_signed() if value.signed else word


class Arithmetic:
    """Adds the hardware of nest bodies to one module.

    `weight` is the signal of the current bit weight where that loop is temporal; `bias` the word that UNBIAS takes off;
    `issued`: digits are never zero and come as 2-bit selects (serial engines).
    """

    def __init__(self, module: Module, nest: Nest, weight: Any = None, bias: Any = None, issued: bool = False) -> None:
        self.module, self.nest, self.weight, self.bias, self.issued = module, nest, weight, bias, issued
        self._negative: dict[int, Any] = {}
        self._names: dict[str, int] = {}

    def build(
        self, body: Sequence[Statement], words: Mapping[tuple[str, tuple[int, ...]], Any],
        indices: Mapping[str, int] | None = None,
    ) -> Words:  # fmt: skip
        """Carry out `body` on signals; the words after it."""
        after = dict(words)
        walk(self.nest, body, after, self.primitives(), indices)
        return after

    def primitives(self) -> Mapping[Operation, Primitive]:
        """The primitives of the nest as hardware added to the module."""
        return {
            Operation.CLEAR: self._clear, Operation.ENCODE: self.encode, Operation.MAP: self._map,
            Operation.MULTIPLY: self._multiply, Operation.SHIFT: self._shift,
            Operation.HALF_REDUCE: self._half_reduce, Operation.ADD: self._add, Operation.ACCUMULATE: self._add,
            Operation.REGISTER: self._register, Operation.UNBIAS: self._unbias, Operation.SYNC: lambda *_: [],
        }  # fmt: skip

    def full_adders(self, words: Sequence[Any], bits: int) -> tuple[Any, Any]:
        """A row of full adders: three words -> their sum as two, bit by bit, no carry chain."""
        x, y, z = words
        total = self._word("sum", signed(bits), x ^ y ^ z)
        return total, self._word("carry", signed(bits), ((x & y) | (x & z) | (y & z)) << 1)

    def _name(self, name: str) -> str:
        self._names[name] = self._names.get(name, 0) + 1
        return f"{name}_{self._names[name]}"

    def _word(self, name: str, form: Any, expression: Any) -> Any:
        word = Signal(form, name=self._name(name))
        self.module.d.comb += word.eq(expression)
        return word

    def _output(self, value: Value, expression: Any) -> Any:
        return self._word(f"{value.name}_next" if value.state else value.name, shape(value), expression)

    def _clear(self, words: Sequence[Any], weight: int, out: Sequence[Value]) -> list[Any]:
        return [self._word(value.name, shape(value), 0) for value in out]

    def encode(self, words: Sequence[Any], weight: int, out: Sequence[Value]) -> list[Any]:
        """The code of one digit of an operand, of a fixed or of the current bit weight."""
        encoding, name = str(self.nest.encoding), self._name(out[0].name)
        if self.weight is None:
            return [encode_digit(self.module, encoding, words[0], weight, name)]
        digits = self.nest.extent("bw")
        codes = [encode_digit(self.module, encoding, words[0], at, f"{name}_{at}") for at in range(digits)]
        code = Signal(code_bits(encoding), name=name)
        self.module.d.comb += code.eq(choose(self.weight, codes))
        return [code]

    def _map(self, words: Sequence[Any], weight: int, out: Sequence[Value]) -> list[Any]:
        """digit * b from b and -b; -b is formed once per operand. Unsigned: plus 2^(bits-1), the top bit inverted."""
        b, code = words
        if len(out) > 1:
            return self._map_apart(b, code, out)
        if id(b) not in self._negative:
            self._negative[id(b)] = negate(self.module, b, self._name("minus_b"))
        bits, name = out[0].bits, self._name(out[0].name)
        if self.issued:
            made = select_issued_multiple(self.module, code, b, self._negative[id(b)], max(bits, len(b) + 2), name)[
                :bits
            ]
            made = self._word(f"{name}_multiple", signed(bits), made.as_signed())
        else:
            made = select_multiple(self.module, str(self.nest.encoding), code, b, self._negative[id(b)], bits, name)
        return [made if out[0].signed else self._word(f"{name}_biased", unsigned(bits), flip_top_bit(made))]

    def _map_apart(self, b: Any, code: Any, out: Sequence[Value]) -> list[Any]:
        """digit * b as an inverted word and the increment that makes it negative."""
        bits, name, wide = out[0].bits, self._name(out[0].name), len(b) + 2
        if self.issued:
            made = select_issued_inverted(self.module, code, b, wide, name)
        else:
            made = select_inverted(self.module, str(self.nest.encoding), code, b, wide, name)
        word = self._word(f"{name}_word", signed(bits), made.word[:bits].as_signed())
        if not out[0].signed:
            word = self._word(f"{name}_biased", unsigned(bits), flip_top_bit(word))
        return [word, self._word(out[1].name, unsigned(1), made.increment)]

    def _multiply(self, words: Sequence[Any], weight: int, out: Sequence[Value]) -> list[Any]:
        if self.nest.product:
            return [self._output(out[0], product_unit(self.nest.product).circuit(self.module, *words))]
        return [self._output(out[0], words[0] * words[1])]

    def _shift(self, words: Sequence[Any], weight: int, out: Sequence[Value]) -> list[Any]:
        places = self.nest.radix.bit_length() - 1
        if len(words) > 1:
            if self.weight is not None:
                raise InputError(f"Nest {self.nest.name!r}: increments are not shifted by a changing weight.")
            filled = Cat(words[1].replicate(weight * places), words[0])
            return [self._output(out[0], _read_as(filled, out[0])), words[1]]
        if self.weight is None:
            return [self._output(out[0], words[0] << (weight * places))]
        choices = [self._word(f"{out[0].name}_{at}", shape(out[0]), words[0] << (at * places))
                   for at in range(self.nest.extent("bw"))]  # fmt: skip
        return [self._output(out[0], _read_as(choose(self.weight, choices), out[0]))]

    def _half_reduce(self, words: Sequence[Any], weight: int, out: Sequence[Value]) -> list[Any]:
        bits = out[0].bits
        increments = [word for word in words if len(word) == 1 and not word.shape().signed]
        wide = [word for word in words if not any(word is other for other in increments)]
        # Every row of full adders has room for an increment in the lowest bit of its carry word; one that is a word of
        # its own makes one more row.
        own = max(0, -((len(wide) - 2 - len(increments)) // 2))
        wide, inserted = [*wide, *increments[:own]], increments[own:]

        def row(x: Any, y: Any, z: Any) -> tuple[Any, Any]:
            total, carry = self.full_adders((x, y, z), bits)
            if inserted:
                carry = self._word("carry_with", signed(bits), Cat(inserted.pop(0), carry[1:]).as_signed())
            return total, carry

        pair = [*reduce_to_two(wide, row), 0][:2]
        return [self._output(value, word) for value, word in zip(out, pair, strict=True)]

    def _add(self, words: Sequence[Any], weight: int, out: Sequence[Value]) -> list[Any]:
        """A binary tree of carry-propagate adders."""
        level = list(words)
        while len(level) > 1:
            pairs = [level[at] + level[at + 1] for at in range(0, len(level) - 1, 2)]
            level = pairs + level[len(level) - len(level) % 2 :]
        return [self._output(out[0], level[0])]

    def _register(self, words: Sequence[Any], weight: int, out: Sequence[Value]) -> list[Any]:
        late = [Signal(shape(value), name=self._name(value.name), reset_less=True) for value in out]
        self.module.d.sync += [register.eq(word) for register, word in zip(late, words, strict=True)]
        return late

    def _unbias(self, words: Sequence[Any], weight: int, out: Sequence[Value]) -> list[Any]:
        if self.bias is None:
            raise InputError(f"Nest {self.nest.name!r}: unbias stands where no bias is known.")
        return [self._output(out[0], words[0] - self.bias)]


class Component:
    """A module with named ports; `inputs` and `outputs` map port name to signal."""

    name: str

    def elaborate(self) -> Module:
        """The hardware."""
        raise NotImplementedError

    def __init__(self) -> None:
        self.inputs: dict[str, Any] = {}
        self.outputs: dict[str, Any] = {}

    def add_input(self, name: str, form: Any) -> Any:
        """The input port `name`, made on first use."""
        if name not in self.inputs:
            self.inputs[name] = Signal(form, name=name)
        return self.inputs[name]

    def add_output(self, name: str, form: Any, **options: Any) -> Any:
        """The output port `name`, made on first use."""
        if name not in self.outputs:
            self.outputs[name] = Signal(form, name=name, **options)
        return self.outputs[name]

    @property
    def ports(self) -> list[Any]:
        """All ports, inputs first."""
        return [*self.inputs.values(), *self.outputs.values()]


class Design(Elaboratable):  # type: ignore[misc]
    """What Amaranth elaborates: a component that is part of a design (those that are only referred to are not)."""

    def __init__(self, component: Component) -> None:
        self.component = component

    def elaborate(self, platform: Any) -> Module:
        return self.component.elaborate()


def rtlil_text(component: Component, resettable: bool = False, zero: Collection[str] = ()) -> str:
    """One module as RTLIL, without source locations. Only a resettable module has a port `rst`.

    `zero`: inputs that are no ports but constant zeros.
    """
    left_out = {id(component.inputs[name]) for name in zero}
    ports = [port for port in component.ports if id(port) not in left_out]
    return str(
        rtlil.convert(
            Design(component), name=component.name, ports=ports, emit_src=False,
            missing_domain=lambda name: ClockDomain(name, reset_less=not resettable),
        )
    )  # fmt: skip
