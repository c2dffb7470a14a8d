"""Hardware of a systolic array, generated from the body of its nest.

Modules and ports (all words two's complement, everything on the rising edge of `clk`):

`pe`: `a_in`, `b_in`, `drain_in`, `<state>_in` (from the north) -> `a_out`, `drain_out` (east), `b_out` (south),
    `<state>_out` (south). Operands and `drain` are registered at the input; the state takes the next value of the
    nest's body, or `<state>_in` while the registered `drain` is 1. There is no reset: draining fills the states
    with zeros.
`output_stage`, one per column: what the nest does after the last step of K (for compressed accumulation the one
    carry-propagate addition, shared by the rows of the column), then a register. It serves a new row every cycle.
`systolic_array`: `rst`, `valid`, `last`, `a_0..`, `b_0..` -> `ready`, `result_0..`, `result_valid` (one bit per
    column), `done`. Hold `rst` for at least rows + columns + 2 cycles. While `ready`, a cycle with `valid` takes one
    column of A and one row of B; `last` marks the final step of K, after which `ready` falls for `rows` cycles. Column
    j then presents its results from the last row to the first. `done` is 1 with the last result of a tile.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from amaranth.back import rtlil
from amaranth.hdl import Cat, ClockDomain, ClockSignal, Elaboratable, Instance, Module, Mux, ResetSignal, Signal, signed
from numpy.typing import NDArray

from bitwright.core.errors import InputError
from bitwright.engine.nest import Nest, Operation, Primitive, Statement, Value, reduce_to_two, walk
from bitwright.engine.systolic import SystolicArray
from bitwright.engine.yosys import run_yosys

PE, OUTPUT_STAGE, TOP = "pe", "output_stage", "systolic_array"


def reset_cycles(array: SystolicArray) -> int:
    """Cycles `rst` must be held so that every state is zero."""
    return array.rows + array.columns + 2


def check_hardware(array: SystolicArray) -> None:
    """Raise InputError for arrays that can be evaluated but not generated."""
    if array.dataflow != "os":
        raise InputError(f"Hardware is generated for output-stationary arrays, not {array.dataflow!r}.")
    if array.nest.encoding not in (None, "mbe"):
        raise InputError(f"Hardware is generated for encoding 'mbe'; {array.encoding!r} can be evaluated only.")


class Arithmetic:
    """Adds the combinational hardware of nest bodies to one module."""

    def __init__(self, module: Module, nest: Nest) -> None:
        self.module, self.nest = module, nest
        self._negative: Any = None
        self._rows = 0

    def build(self, body: Sequence[Statement], words: Mapping[str, Any]) -> dict[str, Any]:
        """Carry out `body` on signals; the words by name after it."""
        after = dict(words)
        walk(self.nest, body, after, self.primitives())
        return after

    def primitives(self) -> Mapping[Operation, Primitive]:
        """The primitives of the nest as hardware added to the module."""
        return {
            Operation.ENCODE: self._encode, Operation.MAP: self._map, Operation.MULTIPLY: self._multiply,
            Operation.SHIFT: self._shift, Operation.HALF_REDUCE: self._half_reduce, Operation.ADD: self._add,
            Operation.ACCUMULATE: self._add,
        }  # fmt: skip

    def full_adders(self, words: Sequence[Any], bits: int) -> tuple[Any, Any]:
        """A row of full adders: three words -> their sum as two, bit by bit, no carry chain."""
        x, y, z = words
        self._rows += 1
        total = self._word(f"sum_{self._rows}", bits, x ^ y ^ z)
        return total, self._word(f"carry_{self._rows}", bits, ((x & y) | (x & z) | (y & z)) << 1)

    def _word(self, name: str, bits: int, expression: Any) -> Any:
        word = Signal(signed(bits), name=name)
        self.module.d.comb += word.eq(expression)
        return word

    def _output(self, value: Value, weight: int, expression: Any) -> Any:
        name = f"{value.name}_{weight}" if value.per else f"{value.name}_next" if value.state else value.name
        return self._word(name, value.bits, expression)

    def _encode(self, words: Sequence[Any], weight: int, out: Sequence[Value]) -> list[Any]:
        """Modified Booth: three bits of a -> (one, two, negative)."""
        a = words[0]
        low = a[2 * weight - 1] if weight else 0
        middle, high = a[2 * weight], a[2 * weight + 1]
        code = Signal(3, name=f"{out[0].name}_{weight}")
        one = middle ^ low
        self.module.d.comb += code.eq(Cat(one, ~one & (high ^ middle), high))
        return [code]

    def _map(self, words: Sequence[Any], weight: int, out: Sequence[Value]) -> list[Any]:
        """digit * b: b or -b, taken once, twice, or not at all. -b is formed once, without a carry chain."""
        b, code = words
        width = len(b) + 1
        if self._negative is None:
            below = Signal(len(b), name="any_below")  # bit i: some bit of b up to i is one
            self.module.d.comb += below.eq(Cat(b[0], *(below[index - 1] | b[index] for index in range(1, len(b)))))
            self._negative = self._word("minus_b", width, b.as_signed() ^ Cat(0, below))
        base = self._word(f"base_{weight}", width, Mux(code[2], self._negative, b))
        once = Cat(base, base[-1]) & code[0].replicate(width + 1)
        twice = Cat(0, base)[: width + 1] & code[1].replicate(width + 1)
        return [self._output(out[0], weight, (once | twice).as_signed())]

    def _multiply(self, words: Sequence[Any], weight: int, out: Sequence[Value]) -> list[Any]:
        return [self._output(out[0], weight, words[0] * words[1])]

    def _shift(self, words: Sequence[Any], weight: int, out: Sequence[Value]) -> list[Any]:
        places = weight * (self.nest.radix.bit_length() - 1)
        return [self._output(out[0], weight, words[0] << places)]

    def _half_reduce(self, words: Sequence[Any], weight: int, out: Sequence[Value]) -> list[Any]:
        wide = [word if len(word) == out[0].bits else word.as_signed() for word in words]
        pair = [*reduce_to_two(wide, lambda x, y, z: self.full_adders((x, y, z), out[0].bits)), 0][:2]
        return [self._output(value, weight, word) for value, word in zip(out, pair, strict=True)]

    def _add(self, words: Sequence[Any], weight: int, out: Sequence[Value]) -> list[Any]:
        total = words[0]
        for word in words[1:]:
            total = total + word
        return [self._output(out[0], weight, total)]


class Component:
    """A module with named ports; `inputs` and `outputs` map port name to signal."""

    name: str

    def elaborate(self) -> Module:
        """The hardware."""
        raise NotImplementedError

    def __init__(self) -> None:
        self.inputs: dict[str, Any] = {}
        self.outputs: dict[str, Any] = {}

    def add_input(self, name: str, shape: Any) -> Any:
        """The input port `name`, made on first use."""
        return self.inputs.setdefault(name, Signal(shape, name=name))

    def add_output(self, name: str, shape: Any, **options: Any) -> Any:
        """The output port `name`, made on first use."""
        return self.outputs.setdefault(name, Signal(shape, name=name, **options))

    @property
    def ports(self) -> list[Any]:
        """All ports, inputs first."""
        return [*self.inputs.values(), *self.outputs.values()]


class _Design(Elaboratable):  # type: ignore[misc]
    """What Amaranth elaborates: a component that is part of a design (those that are only referred to are not)."""

    def __init__(self, component: Component) -> None:
        self.component = component

    def elaborate(self, platform: Any) -> Module:
        return self.component.elaborate()


class ProcessingElement(Component):
    """The module `pe` of an array; see the module docstring."""

    name = PE

    def __init__(self, array: SystolicArray) -> None:
        super().__init__()
        check_hardware(array)
        self.nest = array.nest
        for name, shape in (("a", signed(array.a_bits)), ("b", signed(array.b_bits)), ("drain", 1)):
            self.add_input(f"{name}_in", shape)
            self.add_output(f"{name}_out", shape, reset_less=True)
        for state in self.nest.states:
            self.add_input(f"{state.name}_in", signed(state.bits))
            self.add_output(f"{state.name}_out", signed(state.bits), reset_less=True)

    def elaborate(self) -> Module:
        """Input registers, the body of the nest, state registers."""
        module = Module()
        for name in ("a", "b", "drain"):
            module.d.sync += self.outputs[f"{name}_out"].eq(self.inputs[f"{name}_in"])
        words = {"a": self.outputs["a_out"], "b": self.outputs["b_out"]}
        words |= {state.name: self.outputs[f"{state.name}_out"] for state in self.nest.states}
        after = Arithmetic(module, self.nest).build(self.nest.each_step(), words)
        for state in self.nest.states:
            following = Mux(self.outputs["drain_out"], self.inputs[f"{state.name}_in"], after[state.name])
            module.d.sync += self.outputs[f"{state.name}_out"].eq(following)
        return module


class OutputStage(Component):
    """The module `output_stage` of an array; see the module docstring."""

    name = OUTPUT_STAGE

    def __init__(self, array: SystolicArray) -> None:
        super().__init__()
        self.nest = array.nest
        for state in self.nest.states:
            self.add_input(state.name, signed(state.bits))
        self.add_output("result", signed(array.accumulator_bits), reset_less=True)

    def elaborate(self) -> Module:
        """What follows the last step of K, registered."""
        module = Module()
        after = Arithmetic(module, self.nest).build(self.nest.after_last_step(), self.inputs)
        module.d.sync += self.outputs["result"].eq(after[self.nest.result])
        return module


class OutputStationaryArray(Component):
    """The module `systolic_array`. With `instances`, `pe` and `output_stage` are only referred to by name."""

    name = TOP

    def __init__(self, array: SystolicArray, instances: bool = False) -> None:
        super().__init__()
        check_hardware(array)
        self.array, self.instances = array, instances
        self.add_input("valid", 1)
        self.add_input("last", 1)
        for row in range(array.rows):
            self.add_input(f"a_{row}", signed(array.a_bits))
        for column in range(array.columns):
            self.add_input(f"b_{column}", signed(array.b_bits))
        self.add_output("ready", 1)
        for column in range(array.columns):
            self.add_output(f"result_{column}", signed(array.accumulator_bits))
        self.add_output("result_valid", array.columns)
        self.add_output("done", 1)

    def elaborate(self) -> Module:
        """Control, operand skew, the grid of processing elements, one output stage per column."""
        module, rows, columns = Module(), self.array.rows, self.array.columns
        accept, drain, results_leave = self._control(module)
        east = [self._skewed(module, f"a_{row}", accept, row) for row in range(rows)]
        south = [self._skewed(module, f"b_{column}", accept, column) for column in range(columns)]
        states: list[dict[str, Any]] = [{} for _ in range(columns)]
        for row in range(rows):
            a, draining = east[row], drain[row]
            for column in range(columns):
                element = ProcessingElement(self.array)
                inputs = {"a_in": a, "b_in": south[column], "drain_in": draining}
                inputs |= {f"{value.name}_in": states[column].get(value.name, 0) for value in self.array.nest.states}
                out = self._place(module, f"pe_{row}_{column}", element, inputs)
                a, south[column], draining = out["a_out"], out["b_out"], out["drain_out"]
                states[column] = {value.name: out[f"{value.name}_out"] for value in self.array.nest.states}
        self._outputs(module, states, results_leave)
        return module

    def _control(self, module: Module) -> tuple[Any, list[Any], Any]:
        """Accept operands; `rows` cycles after the last ones, drain row 0 for one cycle, row i for i + 1."""
        rows, inputs = self.array.rows, self.inputs
        waiting = Signal(rows, name="waiting")
        accept = Signal(name="accept")
        module.d.comb += [
            self.outputs["ready"].eq(~waiting.any()),
            accept.eq(inputs["valid"] & self.outputs["ready"] & ~ResetSignal()),
        ]
        module.d.sync += waiting.eq(Cat(accept & inputs["last"], waiting)[:rows])
        leaving: Any = waiting[rows - 1]
        clearing: Any = ResetSignal()
        drain = [leaving | clearing]
        for row in range(1, rows):
            delayed = Signal(name=f"leaving_{row}")
            cleared = Signal(name=f"clearing_{row}", init=1)
            module.d.sync += [delayed.eq(leaving), cleared.eq(clearing)]
            leaving, clearing = waiting[rows - 1] | delayed, cleared
            drain.append(leaving | clearing)
        return accept, drain, leaving

    def _skewed(self, module: Module, port: str, accept: Any, delay: int) -> Any:
        word = self.inputs[port]
        entering = Signal.like(word, name=f"{port}_0")
        module.d.comb += entering.eq(Mux(accept, word, 0))
        for step in range(delay):
            following = Signal.like(word, name=f"{port}_{step + 1}", reset_less=True)
            module.d.sync += following.eq(entering)
            entering = following
        return entering

    def _outputs(self, module: Module, states: Sequence[Mapping[str, Any]], results_leave: Any) -> None:
        leaving = results_leave
        for column, words in enumerate(states):
            here = Signal(name=f"leaving_column_{column}")  # in step with the drain signal of the column's last element
            module.d.sync += [here.eq(leaving), self.outputs["result_valid"][column].eq(here)]
            out = self._place(module, f"output_{column}", OutputStage(self.array), words)
            module.d.comb += self.outputs[f"result_{column}"].eq(out["result"])
            before, leaving = leaving, here
        module.d.sync += self.outputs["done"].eq(leaving & ~before)

    def _place(self, module: Module, name: str, part: Component, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """One part inside the array: its output signals by port name."""
        if not self.instances:
            module.submodules[name] = _Design(part)
            module.d.comb += [part.inputs[port].eq(signal) for port, signal in inputs.items()]
            return part.outputs
        outputs = {port: Signal.like(signal, name=f"{name}_{port}") for port, signal in part.outputs.items()}
        sources = {}
        for port, signal in inputs.items():
            sources[port] = Signal.like(part.inputs[port], name=f"{name}_{port}") if isinstance(signal, int) else signal
        connections = {f"i_{port}": signal for port, signal in sources.items()}
        connections |= {f"o_{port}": signal for port, signal in outputs.items()}
        module.submodules[name] = Instance(part.name, i_clk=ClockSignal(), **connections)
        return outputs


def rtlil_text(component: Component) -> str:
    """One module as RTLIL, without source locations. Modules without reset have no `rst` port."""
    reset_less = not isinstance(component, OutputStationaryArray)
    return str(
        rtlil.convert(
            _Design(component), name=component.name, ports=component.ports, emit_src=False,
            missing_domain=lambda name: ClockDomain(name, reset_less=reset_less),
        )
    )  # fmt: skip


def simulation_design(array: SystolicArray) -> tuple[Elaboratable, dict[str, Any]]:
    """The whole array for Amaranth's simulator, and its ports by name. Registers start at zero there."""
    component = OutputStationaryArray(array)
    return _Design(component), {**component.inputs, **component.outputs}


def simulate(component: Component, inputs: Mapping[str, NDArray[np.int64]]) -> dict[str, NDArray[np.int64]]:
    """Drive a clocked component in Amaranth's simulator: port -> value per cycle in, port -> value per cycle out.

    Outputs are those of the cycle in which the inputs of the same index are applied. Raises InputError for inputs
    that are not the component's.
    """
    from amaranth.sim import Simulator

    if set(inputs) != set(component.inputs):
        raise InputError(f"Module {component.name!r} has inputs {sorted(component.inputs)}, not {sorted(inputs)}.")
    length = min(len(values) for values in inputs.values())
    outputs = {port: np.zeros(length, np.int64) for port in component.outputs}

    async def drive(context: Any) -> None:
        for cycle in range(length):
            for port, values in inputs.items():
                context.set(component.inputs[port], int(values[cycle]))
            for port, seen in outputs.items():
                seen[cycle] = context.get(component.outputs[port])
            await context.tick()

    simulator = Simulator(_Design(component))
    simulator.add_clock(1e-6)
    simulator.add_testbench(drive)
    simulator.run()
    return outputs


def generate_rtlil(array: SystolicArray) -> dict[str, str]:
    """RTLIL of each module of the array, by module name."""
    parts: list[Component] = [ProcessingElement(array), OutputStage(array), OutputStationaryArray(array, True)]
    return {part.name: rtlil_text(part) for part in parts}


def generate(array: SystolicArray) -> str:
    """Readable Verilog of the modules `pe`, `output_stage` and `systolic_array`.

    Raises InputError for weight-stationary arrays and encodings other than "mbe", ToolError when Yosys is missing.
    """
    texts = generate_rtlil(array)
    return verilog(texts)


def generate_processing_element(array: SystolicArray) -> str:
    """Readable Verilog of the module `pe` alone. Raises as `generate`."""
    return verilog({PE: rtlil_text(ProcessingElement(array))})


def verilog(modules: Mapping[str, str]) -> str:
    """Verilog of RTLIL modules."""
    reads = "".join(f"read_rtlil {name}.il\n" for name in modules)
    script = f"{reads}proc -norom\nsetattr -unset init w:*\nwrite_verilog -norename -noattr array.v\n"
    return run_yosys(script, {f"{name}.il": text for name, text in modules.items()}, ["array.v"], 300)["array.v"]
