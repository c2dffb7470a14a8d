"""Formal proof that a processing element computes what its nest says: acc + a * b modulo 2^W, for every input.

A SAT solver (Yosys `sat`) needs many minutes for a Booth multiplier against `*` beside 32-bit sums, so the proof is
split at the words between primitives. Each piece of the generated hardware is proved against a behavioural
specification with *free* inputs, hence for any value the pieces before it can produce:

    digits        sum of digit_i * radix^i == a, every digit read from its code as encoded by the hardware
    multiple i    selection of row i == digit_i * b (plus the bias of an unsigned row), for every legal code
    full adders k sum + carry == x + y + z modulo 2^W, every row of the compressor
    addition      each carry-propagate addition == the sum of its inputs modulo 2^bits

Substituting them into each other gives, for the multiply-accumulate element, next acc == acc + a * b, and for the
compressed one, next s + next c == s + c + a * b, both modulo 2^W. The substitution is this argument, not part of the
machine's proof. `whole=True` adds the undivided statement, proved for one value of `a` after the other with everything
else free: complete, for operands of up to 8 bits, and minutes of work.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from amaranth.hdl import Const, Module, Mux, Signal, signed, unsigned

from bitwright.core.errors import InputError
from bitwright.core.progress import progress
from bitwright.engine.encoder_hardware import encode_digits
from bitwright.engine.evaluate import bias_per_step
from bitwright.engine.hardware_rules import check_hardware
from bitwright.engine.nest import Nest, Operation, Primitive, Value, Words
from bitwright.engine.rtl import Arithmetic, Component, rtlil_text
from bitwright.engine.rtl.arithmetic import label, shape
from bitwright.engine.rtl.elements import (
    chain_body,
    chain_states,
    operands,
    states,
    step_body,
    weight_bits,
)
from bitwright.engine.tensor_engine import TensorEngine
from bitwright.engine.yosys import YosysJob, run_yosys, run_yosys_jobs

_SUCCESS = "SUCCESS!"
_MOST_SPLIT_BITS = 8
_VALUES_PER_RUN = 8
_PARALLEL = 2


@dataclass(frozen=True)
class FormalReport:
    """Statements by name, each proved for all inputs or refuted (with the solver's counterexample)."""

    proved: tuple[str, ...]
    refuted: Mapping[str, str]

    @property
    def passed(self) -> bool:
        """Every statement was proved."""
        return not self.refuted


def formal_equivalence(engine: TensorEngine, whole: bool = False, timeout_s: float = 300) -> FormalReport:
    """Prove the arithmetic of one element (one link of a chain); see the module docstring for what is proved.

    `whole` also proves the undivided statement (some minutes at 8 bits). Raises InputError for serial engines, and when
    the undivided statement is asked for wide operands or for elements that do not see whole operands; ToolError when
    Yosys is missing or one of its runs does not finish within `timeout_s`.
    """
    check_provable(engine, whole)
    component = _Statements(engine, whole)
    prepare = "read_rtlil statements.il\nhierarchy -top statements\nproc\nflatten\nopt\n"
    files = {"statements.il": rtlil_text(component)}
    split = whole and engine.nest.encoding is not None
    names = [name for name in component.outputs if not (split and name == "whole")]
    proofs = "".join(f"tee -o {name}.txt sat -prove {name} 1 -show-inputs\n" for name in names)
    logs = run_yosys(prepare + proofs, files, [f"{name}.txt" for name in names], timeout_s)
    proved = [name for name in names if _SUCCESS in logs[f"{name}.txt"]]
    refuted = {name: logs[f"{name}.txt"] for name in names if name not in proved}
    if split:
        failed = _prove_by_cases(engine.a_bits, prepare, files, timeout_s)
        if failed:
            refuted["whole"] = failed
        else:
            proved.append("whole")
    return FormalReport(tuple(proved), refuted)


def check_provable(engine: TensorEngine, whole: bool = False) -> None:
    """Raise InputError for engines and statements that `formal_equivalence` does not take, before any work is done."""
    check_hardware(engine)
    if engine.nest.product:
        raise InputError(
            f"Proofs cover products of integers, not {engine.nest.product!r}, whose table holds every pair of words: "
            "verify it instead."
        )
    if engine.serial:
        raise InputError(
            f"{engine.nest.name}: proofs cover elements that work on all digits at once; verify it instead."
        )
    if whole and engine.a_bits > _MOST_SPLIT_BITS:
        raise InputError(
            f"The undivided proof takes the {1 << engine.a_bits} values of a {engine.a_bits}-bit operand one by one; "
            f"it is offered up to {_MOST_SPLIT_BITS} bits. Prove the pieces instead."
        )
    if whole and (engine.passes > 1 or engine.shares_encoders or len(operands(engine)[0]) > 1):
        raise InputError(
            f"{engine.nest.name}: its elements do not multiply one whole operand; prove the pieces instead."
        )


def _prove_by_cases(bits: int, prepare: str, files: Mapping[str, str | bytes], timeout_s: float) -> str:
    """Prove the statement `whole` for every value of `a`; the log of the first value that fails, "" if none does."""
    values = range(1 << bits)
    with progress("Proving the whole element, value by value", len(values)) as advance:
        for first in range(0, len(values), _VALUES_PER_RUN * _PARALLEL):
            runs = [
                values[at : at + _VALUES_PER_RUN]
                for at in range(first, first + _VALUES_PER_RUN * _PARALLEL, _VALUES_PER_RUN)
            ]
            jobs = []
            for run in filter(None, runs):
                proofs = "".join(f"tee -o {a}.txt sat -prove whole 1 -set a {a} -show-inputs\n" for a in run)
                jobs.append(YosysJob(prepare + proofs, files, [f"{a}.txt" for a in run]))
            for logs in run_yosys_jobs(jobs, _PARALLEL, timeout_s):
                for log in logs.values():
                    if _SUCCESS not in log:
                        return log
            advance(sum(map(len, runs)))
    return ""


class _Pieces(Arithmetic):
    """The arithmetic of a nest, cut after every piece: what follows a piece sees a free word instead."""

    def __init__(self, component: Component, module: Module, nest: Nest, weight: Any = None) -> None:
        super().__init__(module, nest, weight)
        self.component = component
        self.counts: dict[str, int] = {}

    def primitives(self) -> Mapping[Operation, Primitive]:
        table = dict(super().primitives())
        select = table[Operation.MAP]

        def multiple(words: Sequence[Any], weight: int, out: Sequence[Value]) -> Sequence[Any]:
            b, code = words
            bias = 0 if out[0].signed else 1 << (out[0].bits - 1)
            made = select(words, weight, out)
            return [self._cut("multiple", made, digit_value(code) * b + bias, out[0], legal_code(code))]

        def addition(primitive: Primitive) -> Primitive:
            def add(words: Sequence[Any], weight: int, out: Sequence[Value]) -> Sequence[Any]:
                return [self._cut("addition", primitive(words, weight, out), sum(words[1:], words[0]), out[0])]

            return add

        table[Operation.MAP] = multiple
        table[Operation.REGISTER] = lambda words, weight, out: list(words)
        for operation in (Operation.ADD, Operation.ACCUMULATE):
            table[operation] = addition(table[operation])
        return table

    def full_adders(self, words: Sequence[Any], bits: int) -> tuple[Any, Any]:
        made = super().full_adders(words, bits)
        total = self._cut("full_adders", made, sum(words[1:], words[0]), Value("sum", bits))
        return total, self.component.add_input(f"carry_{total.name}", signed(bits))

    def _cut(self, what: str, made: Sequence[Any], meaning: Any, value: Value, given: Any = None) -> Any:
        """State that the words made add up to their meaning modulo 2^bits; a free word to go on with."""
        number = self.counts[what] = self.counts.get(what, 0) + 1
        holds = self.component.add_output(f"{what}_{number}", 1)
        found, wanted = Signal(value.bits), Signal(value.bits)
        self.module.d.comb += [found.eq(sum(made[1:], made[0])), wanted.eq(meaning)]
        equal = found == wanted
        self.module.d.comb += holds.eq(equal if given is None else equal | ~given)
        return self.component.add_input(f"free_{what}_{number}", shape(value))


class _Statements(Component):
    """One output per statement, 1 where it holds."""

    name = "statements"

    def __init__(self, engine: TensorEngine, whole: bool) -> None:
        super().__init__()
        self.module, nest = Module(), engine.nest
        body = chain_body(engine) if engine.chain else step_body(nest)
        words: Words = {
            (word.name, word.key): self.add_input(word.port, word.form) for side in operands(engine) for word in side
        }
        sums = chain_states(engine) if engine.chain else tuple((state, ()) for state in states(engine))
        words |= {(state.name, key): self.add_input(label(state.name, key), shape(state)) for state, key in sums}
        weight = None
        if engine.passes > 1 and not engine.shares_encoders:
            weight = self.add_input("weight", unsigned(weight_bits(engine)))
        if nest.encoding is not None:
            a = self.add_input("whole_operand", signed(engine.a_bits))
            codes = encode_digits(self.module, nest.encoding, a, "whole_digit")
            places = nest.radix.bit_length() - 1
            digits = sum((digit_value(code) << (places * at) for at, code in enumerate(codes)), Const(0, signed(1)))
            self.module.d.comb += self.add_output("digits", 1).eq(digits == a)
            _Pieces(self, self.module, nest, weight).build(body, words, {"kp": 0})
        if whole or nest.encoding is None:
            after = _Unregistered(self.module, nest).build(body, words, {"kp": 0})
            before = Signal(signed(engine.accumulator_bits))
            following = Signal(signed(engine.accumulator_bits))
            bits = min(state.bits for state, _ in sums)
            product = words["a", ()] * words["b", ()] + bias_per_step(nest) // (engine.depth if engine.chain else 1)
            self.module.d.comb += [
                before.eq(sum((words[state.name, key] for state, key in sums), product)),
                following.eq(sum((after[state.name, key] for state, key in sums), Const(0, signed(1)))),
                self.add_output("whole", 1).eq(before[:bits] == following[:bits]),
            ]

    def elaborate(self) -> Module:
        return self.module


class _Unregistered(Arithmetic):
    """The arithmetic of a nest with its pipeline registers left out."""

    def _register(self, words: Sequence[Any], weight: int, out: Sequence[Value]) -> list[Any]:
        return list(words)


def digit_value(code: Any) -> Any:
    """The digit that a code stands for, as a behavioural formula: (one + 2 two), negated."""
    magnitude = code[0] if len(code) == 2 else code[0] + (code[1] << 1)
    return Mux(code[-1], -magnitude, magnitude)


def legal_code(code: Any) -> Any:
    """Whether a code is one that encoders make: not one and two at once."""
    return Const(1, 1) if len(code) == 2 else ~(code[0] & code[1])
