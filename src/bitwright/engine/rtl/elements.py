"""The modules an engine is built of, cut out of its nest by the loops their steps stand in.

`pe`: one position (m, n): operand registers, what the nest does inside np for each step of K, the states that grow
with K. `a_in`, `b_in` (or codes `d_in` where the encoders are shared), `drain_in`, `<state>_in` -> `<state>_out`; in an
output-stationary array also the operands and `drain` one cycle later as `.._out`. The states take `<state>_in` while
the registered `drain` is 1. There is no reset: draining fills the states with zeros. Next to a chain, `pe` has no
operands: it takes the running sums of the chain's end instead.
`chain_element`: one link of a chain along K: operand registers, the running sums from the link before -> after.
`output_stage`: what the nest does after the last step of K, then a register.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from amaranth.hdl import Cat, Module, Mux, Signal, signed, unsigned

from bitwright.core.errors import InputError
from bitwright.engine.encoder_hardware import code_bits
from bitwright.engine.nest import REDUCTIONS, Loop, Nest, Operation, Primitive, Statement, Value, Words, loops, steps
from bitwright.engine.rtl.arithmetic import Arithmetic, Component, label, shape
from bitwright.engine.tensor_engine import ADDER_BITS, TensorEngine
from bitwright.engine.widths import state_values

PE, CHAIN_ELEMENT, OUTPUT_STAGE = "pe", "chain_element", "output_stage"


@dataclass(frozen=True)
class Operand:
    """One word that enters an element: its name and key in the nest."""

    name: str
    key: tuple[int, ...]
    form: Any

    @property
    def port(self) -> str:
        """Its port name, without `_in`."""
        return label(self.name, self.key)


def step_body(nest: Nest) -> tuple[Statement, ...]:
    """What one position (m, n) does per step of K."""
    inner = [loop for loop in loops(nest.loop("kt").body) if loop.index == "np"]
    if len(inner) != 1:
        raise InputError(f"Nest {nest.name!r}: expected one loop np inside kt, found {len(inner)}.")
    return inner[0].body


def edge_body(nest: Nest) -> tuple[Statement, ...]:
    """The encoders that stand outside the loop over columns, per step of K (for one link of a chain)."""
    body = tuple(_without(nest.loop("kt").body, "np"))
    if len(body) == 1 and isinstance(body[0], Loop) and body[0].index == "kp" and nest.dataflow in ("ws", "cube"):
        return body[0].body
    return body


def _without(body: Sequence[Statement], index: str) -> Iterator[Statement]:
    for statement in body:
        if isinstance(statement, Loop):
            if statement.index == index:
                continue
            kept = tuple(_without(statement.body, index))
            if statement.dimension in ("M", "N"):
                yield from kept
            elif kept:
                yield Loop(statement.index, statement.dimension, statement.extent, statement.spatial, kept,
                           statement.stride, statement.sparse)  # fmt: skip
        elif statement.operation is Operation.ENCODE:
            yield statement


def after_body(nest: Nest) -> tuple[Statement, ...]:
    """What happens to the states of one position after the last step of K (of a pass)."""
    inside = {id(loop) for loop in loops(nest.loop("kt").body)}
    found: list[Statement] = []
    for loop in loops(nest.body):
        if loop.index == "np" and id(loop) not in inside:
            found.extend(loop.body)
    return tuple(found)


def chain_body(engine: TensorEngine) -> tuple[Statement, ...]:
    """What one link of the chain along K does, inside the spatial loops that stand around the chain."""
    inner = engine.chain
    if inner is None:
        raise InputError(f"Dataflow {engine.dataflow!r} has no chain along K.")
    if engine.dataflow == "ws":
        return step_body(engine.nest)
    body = inner.body
    for loop in reversed([loop for loop in loops(step_body(engine.nest)) if inner in loops(loop.body)]):
        body = (replace(loop, body=body),)
    return body


def states(engine: TensorEngine) -> tuple[Value, ...]:
    """The states of one position that grow with K inside its steps."""
    made = {name for step in steps(step_body(engine.nest)) for name in step.outputs}
    return tuple(value for value in state_values(engine.nest) if value.name in made)


def chain_states(engine: TensorEngine) -> tuple[tuple[Value, tuple[int, ...]], ...]:
    """The running sums that travel along the chain, with their positions (a sum per kb where there are several)."""
    body = chain_body(engine)
    carried = [
        name for step in steps(body) if step.operation in REDUCTIONS for name in step.outputs if name in step.inputs
    ]
    nest = engine.nest
    return tuple(
        (nest.words[name], key)
        for name in carried
        for key in product(*(range(nest.extent(i)) for i in nest.words[name].per))
    )


def positions(nest: Nest, name: str) -> list[tuple[tuple[int, ...], int]]:
    """The elements of an operand that one position takes per step (one link of a chain), with their offsets in K.

    What is replicated along a chain is seen as its first link sees it.
    """
    strides = {loop.index: loop.stride for loop in loops(nest.body) if loop.dimension == "K"}
    per, chained = nest.words[name].per, nest.dataflow in ("ws", "cube")
    return [
        (key, sum(at * strides.get(index, 0) for index, at in zip(per, key, strict=True)))
        for key in product(*(range(1 if index == "kp" and chained else nest.extent(index)) for index in per))
    ]


def operands(engine: TensorEngine) -> tuple[list[Operand], list[Operand]]:
    """The words that enter an element (one link of a chain) from A's side and from B's side."""
    nest = engine.nest
    name = "d" if engine.shares_encoders else "a"
    form = unsigned(code_bits(str(nest.encoding))) if name == "d" else signed(engine.a_bits)
    left = [Operand(name, key, form) for key, _ in positions(nest, name)]
    return left, [Operand("b", key, signed(engine.b_bits)) for key, _ in positions(nest, "b")]


class _Element(Component):
    """Operand registers and the arithmetic of a body."""

    hops = False

    def __init__(self, engine: TensorEngine) -> None:
        super().__init__()
        self.engine, self.nest = engine, engine.nest
        self.weighted = engine.passes > 1 and not engine.shares_encoders

    def declare_operands(self) -> None:
        left, right = operands(self.engine)
        self.words_in = left + right
        ports = [(operand.port, operand.form) for operand in self.words_in]
        if self.weighted:
            ports.append(("weight", unsigned(weight_bits(self.engine))))
        for port, form in ports:
            self.add_input(f"{port}_in", form)
            if self.hops:
                self.add_output(f"{port}_out", form, reset_less=True)

    def registered(self, module: Module, port: str) -> Any:
        """The register behind an input port: the output port of the same name, or one inside."""
        word = self.inputs[f"{port}_in"]
        late = self.outputs[f"{port}_out"] if f"{port}_out" in self.outputs else register_like(word, f"{port}_held")
        module.d.sync += late.eq(word)
        return late

    def held(self, module: Module) -> tuple[Words, Any]:
        words: Words = {(item.name, item.key): self.registered(module, item.port) for item in self.words_in}
        return words, self.registered(module, "weight") if self.weighted else None


def register_like(word: Any, name: str) -> Any:
    """A register of the shape of a word, without reset."""
    return Signal.like(word, name=name, reset_less=True)


def weight_bits(engine: TensorEngine) -> int:
    """Bits of the index of a bit weight."""
    return max(1, (engine.passes - 1).bit_length())


class ProcessingElement(_Element):
    """The module `pe`; see the module docstring."""

    name = PE

    def __init__(self, engine: TensorEngine) -> None:
        super().__init__(engine)
        self.hops = engine.dataflow == "os"
        self.words_in: list[Operand] = []
        self.chained = engine.chain is not None
        if self.chained:
            for value, key in chain_states(engine):
                self.add_input(f"{label(value.name, key)}_in", shape(value))
            self.weighted = False
        else:
            self.declare_operands()
        self.add_input("drain_in", 1)
        if self.hops:
            self.add_output("drain_out", 1, reset_less=True)
        for state in states(engine):
            self.add_input(f"{state.name}_in", shape(state))
            self.add_output(f"{state.name}_out", shape(state), reset_less=True)

    def elaborate(self) -> Module:
        """Input registers, the body of the nest, state registers."""
        module = Module()
        words, weight = self.held(module)
        body = step_body(self.nest)
        if self.chained:
            words = {(v.name, key): self.inputs[f"{label(v.name, key)}_in"] for v, key in chain_states(self.engine)}
            carried = {value.name for value, _ in chain_states(self.engine)}
            body = tuple(_after_chain(body, carried))
        draining = self.registered(module, "drain")
        kept = states(self.engine)
        words |= {(state.name, ()): self.outputs[f"{state.name}_out"] for state in kept}
        after = Arithmetic(module, self.nest, weight).build(body, words)
        for state in kept:
            following = Mux(draining, self.inputs[f"{state.name}_in"], after[state.name, ()])
            module.d.sync += self.outputs[f"{state.name}_out"].eq(following)
        return module


def _after_chain(body: Sequence[Statement], carried: set[str]) -> Iterator[Statement]:
    """The body without the chain itself and without clearing its sums."""
    for statement in body:
        if isinstance(statement, Loop):
            if statement.index == "kp":
                continue
            kept = tuple(_after_chain(statement.body, carried))
            if kept:
                yield Loop(
                    statement.index, statement.dimension, statement.extent, statement.spatial, kept, statement.stride
                )
        elif not (statement.operation is Operation.CLEAR and set(statement.outputs) <= carried):
            yield statement


class ChainElement(_Element):
    """The module `chain_element`; see the module docstring. In a weight-stationary array B stays: see `stationary`."""

    name = CHAIN_ELEMENT

    def __init__(self, engine: TensorEngine) -> None:
        super().__init__(engine)
        self.stationary = engine.dataflow == "ws"
        self.hops = False
        self.declare_operands()
        if self.stationary:
            for operand in self.words_in:
                self.add_output(f"{operand.port}_out", operand.form, reset_less=True)
            self.add_input("load_in", 1)
            self.add_input("first_in", 1)
            self.add_output("first_out", 1, reset_less=True)
        for value, key in chain_states(engine):
            name = label(value.name, key)
            self.add_input(f"{name}_in", shape(value))
            self.add_output(f"{name}_out", shape(value), reset_less=True)

    def elaborate(self) -> Module:
        """Operand registers, the body of the chain, registers of the running sums."""
        module = Module()
        if self.stationary:
            words = self._stationary(module)
            weight = None
        else:
            words, weight = self.held(module)
        sums = chain_states(self.engine)
        words |= {(value.name, key): self.inputs[f"{label(value.name, key)}_in"] for value, key in sums}
        after = Arithmetic(module, self.nest, weight).build(chain_body(self.engine), words, {"kp": 0})
        for value, key in sums:
            module.d.sync += self.outputs[f"{label(value.name, key)}_out"].eq(after[value.name, key])
        return module

    def _stationary(self, module: Module) -> Words:
        """A moves on every cycle. B moves south while `load` is 1 and is taken over with `first`."""
        words: Words = {}
        self.registered(module, "first")
        for operand in self.words_in:
            word, late = self.inputs[f"{operand.port}_in"], self.outputs[f"{operand.port}_out"]
            if operand.name == "b":
                kept = register_like(word, f"{operand.port}_kept")
                with module.If(self.inputs["load_in"]):
                    module.d.sync += late.eq(word)
                with module.If(self.inputs["first_in"]):
                    module.d.sync += kept.eq(late)
                words[operand.name, operand.key] = kept
            else:
                module.d.sync += late.eq(word)
                words[operand.name, operand.key] = late
        return words


class OutputStage(Component):
    """The module `output_stage`: inputs are the states, `bias` and `weight` where the nest needs them, and with several
    passes `partial`, the result so far, needed `output_cycles[1]` cycles before the new `result`."""

    name = OUTPUT_STAGE

    def __init__(self, engine: TensorEngine) -> None:
        super().__init__()
        self.engine, self.nest = engine, engine.nest
        self.body = after_body(self.nest)
        for state in states(engine):
            self.add_input(state.name, shape(state))
        if any(step.operation is Operation.UNBIAS for step in steps(self.body)):
            self.add_input("bias", unsigned(bias_bits(engine)))
        if engine.passes > 1:
            self.add_input("weight", unsigned(weight_bits(engine)))
            self.add_input("partial", signed(engine.accumulator_bits))
        self.add_output("result", signed(engine.accumulator_bits))

    def elaborate(self) -> Module:
        """What follows the last step of K: additions, some bits per cycle, the shift between them."""
        module = Module()
        words: Words = {(state.name, ()): self.inputs[state.name] for state in states(self.engine)}
        arithmetic = _OutputArithmetic(module, self.nest, self.inputs.get("weight"), self.inputs.get("bias"))
        if self.engine.passes > 1:
            words[self.nest.result, ()] = self.inputs["partial"]
        result = arithmetic.build(self.body, words)[self.nest.result, ()]
        if not self.body:
            late = register_like(result, "result_held")
            module.d.sync += late.eq(result)
            result = late
        module.d.comb += self.outputs["result"].eq(result)
        return module


class _OutputArithmetic(Arithmetic):
    """Additions in steps of `ADDER_BITS`, one per cycle; the weight keeps up with the sum it belongs to."""

    def _staged(self, words: Sequence[Any], carry: int, value: Value) -> Any:
        """The sum of two words and a carry, one slice of bits per cycle, registered."""
        slices = range(0, value.bits, ADDER_BITS)
        found: list[Any] = []
        for at, low in enumerate(slices):
            high = min(low + ADDER_BITS, value.bits)
            x, y = (self._late(Cat(_extended(word, value.bits)[low:high]), at) for word in words)
            total = Signal(high - low + 1, name=self._name("slice"), reset_less=True)
            self.module.d.sync += total.eq(x + y + carry)
            carry = total[high - low]
            found.append(self._late(total[: high - low], len(slices) - 1 - at))
        if self.weight is not None:
            self.weight = self._late(self.weight, len(slices))
        return self._word(value.name, shape(value), _signed_as(Cat(*found), value))

    def _late(self, word: Any, cycles: int) -> Any:
        for _ in range(cycles):
            late = Signal(len(word), name=self._name("late"), reset_less=True)
            self.module.d.sync += late.eq(word)
            word = late
        return word

    def _add(self, words: Sequence[Any], weight: int, out: Sequence[Value]) -> list[Any]:
        # The bias of a sum is taken off with the same addition, not by the unbias that follows.
        if self.bias is not None:
            words = self.full_adders((*words, (~self.bias)[: out[0].bits]), out[0].bits)
            return [self._staged(words, 1, out[0])]
        return [self._staged(words, 0, out[0])]

    def _accumulate(self, words: Sequence[Any], weight: int, out: Sequence[Value]) -> list[Any]:
        return [self._staged(words, 0, out[0])]

    def _unbias(self, words: Sequence[Any], weight: int, out: Sequence[Value]) -> list[Any]:
        if any(step.operation is Operation.ADD for step in steps(after_body(self.nest))):
            return [self._output(out[0], words[0])]
        return [self._staged((words[0], ~self.bias), 1, out[0])]

    def primitives(self) -> Mapping[Operation, Primitive]:
        return {**super().primitives(), Operation.ACCUMULATE: self._accumulate}


def _extended(word: Any, bits: int) -> Any:
    """A word read at another width."""
    return word[:bits] if len(word) >= bits else Cat(word, *([_sign(word)] * (bits - len(word))))


def _sign(word: Any) -> Any:
    return word[-1] if word.shape().signed else 0


def _signed_as(word: Any, value: Value) -> Any:
    return word.as_signed() if value.signed else word


def bias_bits(engine: TensorEngine) -> int:
    """Width of the word that UNBIAS takes off: that of the states."""
    return max(state.bits for state in states(engine))
