"""Formal proof that a processing element computes what its nest says: acc + a * b modulo 2^W, for every input.

A SAT solver (Yosys `sat`) needs many minutes for a Booth multiplier against `*` beside 32-bit sums, so the proof is
split at the words between primitives. Each piece of the generated hardware is proved against a behavioural
specification with *free* inputs, hence for any value the pieces before it can produce:

    digits        sum of digit_i * radix^i == a, the digits as behavioural formulas of the bits of a
    multiple i    encoder and selection of row i == digit_i * b
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

from amaranth.hdl import Module, Signal, signed

from bitwright.core.errors import InputError
from bitwright.core.progress import progress
from bitwright.engine.nest import Nest, Operation, Primitive, Value
from bitwright.engine.rtl import Arithmetic, Component, check_hardware, rtlil_text
from bitwright.engine.systolic import SystolicArray
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


def formal_equivalence(array: SystolicArray, whole: bool = False, timeout_s: float = 300) -> FormalReport:
    """Prove the arithmetic of the array's processing element; see the module docstring for what is proved.

    `whole` also proves the undivided statement (some minutes at 8 bits). Raises InputError when that is asked for wide
    operands, ToolError when Yosys is missing or one of its runs does not finish within `timeout_s`.
    """
    if whole and array.a_bits > _MOST_SPLIT_BITS:
        raise InputError(
            f"The undivided proof takes the {1 << array.a_bits} values of a {array.a_bits}-bit operand one by one; "
            f"it is offered up to {_MOST_SPLIT_BITS} bits. Prove the pieces instead."
        )
    component = _Statements(array, whole)
    prepare = "read_rtlil statements.il\nhierarchy -top statements\nproc\nflatten\nopt\n"
    files = {"statements.il": rtlil_text(component)}
    split = whole and array.nest.encoding is not None
    names = [name for name in component.outputs if not (split and name == "whole")]
    proofs = "".join(f"tee -o {name}.txt sat -prove {name} 1 -show-inputs\n" for name in names)
    logs = run_yosys(prepare + proofs, files, [f"{name}.txt" for name in names], timeout_s)
    proved = [name for name in names if _SUCCESS in logs[f"{name}.txt"]]
    refuted = {name: logs[f"{name}.txt"] for name in names if name not in proved}
    if split:
        failed = _prove_by_cases(array.a_bits, prepare, files, timeout_s)
        if failed:
            refuted["whole"] = failed
        else:
            proved.append("whole")
    return FormalReport(tuple(proved), refuted)


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

    def __init__(self, component: Component, module: Module, nest: Nest) -> None:
        super().__init__(module, nest)
        self.component = component
        self.counts: dict[str, int] = {}

    def primitives(self) -> Mapping[Operation, Primitive]:
        table = dict(super().primitives())
        encode, select = table[Operation.ENCODE], table[Operation.MAP]
        operands: list[Any] = []

        def remember(words: Sequence[Any], weight: int, out: Sequence[Value]) -> Sequence[Any]:
            operands[:] = words
            return encode(words, weight, out)

        def multiple(words: Sequence[Any], weight: int, out: Sequence[Value]) -> Sequence[Any]:
            made = select(words, weight, out)
            return [self._cut("multiple", made, booth_digit(operands[0], weight) * words[0], out[0].bits)]

        def addition(primitive: Primitive) -> Primitive:
            def add(words: Sequence[Any], weight: int, out: Sequence[Value]) -> Sequence[Any]:
                return [self._cut("addition", primitive(words, weight, out), sum(words[1:], words[0]), out[0].bits)]

            return add

        table[Operation.ENCODE], table[Operation.MAP] = remember, multiple
        for operation in (Operation.ADD, Operation.ACCUMULATE):
            table[operation] = addition(table[operation])
        return table

    def full_adders(self, words: Sequence[Any], bits: int) -> tuple[Any, Any]:
        made = super().full_adders(words, bits)
        total = self._cut("full_adders", made, sum(words[1:], words[0]), bits)
        return total, self.component.add_input(f"carry_{total.name}", signed(bits))

    def _cut(self, what: str, made: Sequence[Any], meaning: Any, bits: int) -> Any:
        """State that the words made add up to their meaning modulo 2^bits; a free word to go on with."""
        number = self.counts[what] = self.counts.get(what, 0) + 1
        holds = self.component.add_output(f"{what}_{number}", 1)
        self.module.d.comb += holds.eq(sum(made[1:], made[0])[:bits] == meaning.as_signed()[:bits])
        return self.component.add_input(f"free_{what}_{number}", signed(bits))


class _Statements(Component):
    """One output per statement, 1 where it holds."""

    name = "statements"

    def __init__(self, array: SystolicArray, whole: bool) -> None:
        super().__init__()
        check_hardware(array)
        self.module, nest = Module(), array.nest
        a, b = self.add_input("a", signed(array.a_bits)), self.add_input("b", signed(array.b_bits))
        words = {"a": a, "b": b}
        words |= {state.name: self.add_input(state.name, signed(state.bits)) for state in nest.states}
        if nest.encoding is not None:
            digits = sum(booth_digit(a, weight) << (2 * weight) for weight in range(array.a_bits // 2))
            self.module.d.comb += self.add_output("digits", 1).eq(digits == a)
            _Pieces(self, self.module, nest).build(nest.each_step(), words)
        if whole or nest.encoding is None:
            after = Arithmetic(self.module, nest).build(nest.each_step(), words)
            before = Signal(signed(array.accumulator_bits))
            following = Signal(signed(array.accumulator_bits))
            self.module.d.comb += [
                before.eq(sum((words[state.name] for state in nest.states), a * b)),
                following.eq(sum((after[state.name] for state in nest.states[1:]), after[nest.states[0].name])),
                self.add_output("whole", 1).eq(before == following),
            ]

    def elaborate(self) -> Module:
        return self.module


def booth_digit(a: Any, weight: int) -> Any:
    """Radix-4 Booth digit as a behavioural formula: -2 a[2i+1] + a[2i] + a[2i-1], with a[-1] = 0."""
    low = a[2 * weight - 1] if weight else 0
    return a[2 * weight] + low - (a[2 * weight + 1] << 1)
