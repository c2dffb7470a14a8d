"""The arrays whose results stay in place: output-stationary, 2D-matrix, 3D-cube and multiplier-adder tree.

Module `tensor_engine`: `rst`, `valid`, `last`, operands `a_<row>`, `b_<column>` (with the K position of a step appended
when an element takes several: `a_<row>_<k>`), with several passes `weight` and `partial_<column>` -> `ready`,
`result_<column>`, `result_valid` (one bit per column), `done`. While `ready`, a cycle with `valid` takes one step of K;
`last` marks the final one of a pass, after which `ready` falls for `rows` cycles. Column j then presents its results
from the last row to the first; `done` is 1 with the last one. `weight` is the bit weight of the pass; with several
passes column j expects in `partial_<j>`, `output_cycles[1]` cycles before the result, the sum of the passes before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from amaranth.hdl import Cat, ClockSignal, Instance, Module, Mux, ResetSignal, Signal, signed, unsigned

from bitwright.engine.evaluate import bias_per_step
from bitwright.engine.nest import Words
from bitwright.engine.rtl.arithmetic import Arithmetic, Component, Design, label
from bitwright.engine.rtl.elements import (
    ChainElement,
    OutputStage,
    ProcessingElement,
    bias_bits,
    chain_states,
    edge_body,
    operands,
    positions,
    register_like,
    states,
    weight_bits,
)
from bitwright.engine.tensor_engine import TensorEngine

Key = tuple[str, tuple[int, ...]]
TOP = "tensor_engine"


def operand_port(side: str, index: int, position: int, step: int) -> str:
    """Port of one operand word of a row (a) or column (b)."""
    return f"{side}_{index}" if step == 1 else f"{side}_{index}_{position}"


class Assembly(Component):
    """A top module: places parts, as submodules or (with `instances`) only by name."""

    name = TOP

    def __init__(self, engine: TensorEngine, instances: bool) -> None:
        super().__init__()
        self.engine, self.nest, self.instances = engine, engine.nest, instances

    def place(self, module: Module, name: str, part: Component, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """One part inside the engine: its output signals by port name."""
        if not self.instances:
            module.submodules[name] = Design(part)
            module.d.comb += [part.inputs[port].eq(signal) for port, signal in inputs.items()]
            return part.outputs
        outputs = {port: Signal.like(signal, name=f"{name}_{port}") for port, signal in part.outputs.items()}
        connections: dict[str, Any] = {}
        for port, signal in inputs.items():
            source = Signal.like(part.inputs[port], name=f"{name}_{port}")
            module.d.comb += source.eq(signal)
            connections[f"i_{port}"] = source
        connections |= {f"o_{port}": signal for port, signal in outputs.items()}
        module.submodules[name] = Instance(part.name, i_clk=ClockSignal(), **connections)
        return outputs

    def entering(self, module: Module, side: str, index: int, accept: Any) -> dict[Key, Any]:
        """The operand words of a row (a) or column (b) while accepted, else zero; where encoders are shared, registered
        first, and those of a row encoded. Keys are those of the nest, after the link of a chain along K."""
        engine = self.engine
        wanted = operands(engine)[0 if side == "a" else 1]
        links = range(engine.depth) if engine.chain else [None]
        entering: dict[Key, Any] = {}
        for link in links:
            words: Words = {}
            before = () if link is None else (link,)
            for key, offset in positions(self.nest, side):
                position = offset + (link or 0) * (engine.chain.stride if engine.chain else 0)
                port = self.inputs[operand_port(side, index, position, engine.step)]
                word = Signal.like(port, name=label(f"{side}_entering_{index}", (*before, *key)))
                module.d.comb += word.eq(Mux(accept, port, 0))
                words[side, key] = self.delayed(module, word, 1) if engine.shares_encoders else word
            if side == "a" and engine.shares_encoders:
                words = Arithmetic(module, self.nest, self.held_weight).build(edge_body(self.nest), words, {"kp": 0})
            entering |= {(item.name, (*before, *item.key)): words[item.name, item.key] for item in wanted}
        return entering

    held_weight: Any = None

    def delayed(self, module: Module, word: Any, cycles: int, name: str = "") -> Any:
        """A word some cycles later."""
        for step in range(cycles):
            late = register_like(word, f"{name or word.name}_{step + 1}")
            module.d.sync += late.eq(word)
            word = late
        return word


class Grid(Assembly):
    """The module of an engine whose results stay in place; see the module docstring."""

    def __init__(self, engine: TensorEngine, instances: bool = False) -> None:
        super().__init__(engine, instances)
        self.hops = engine.dataflow == "os"
        self.add_input("valid", 1)
        self.add_input("last", 1)
        for row in range(engine.rows):
            for position in range(engine.step):
                self.add_input(operand_port("a", row, position, engine.step), signed(engine.a_bits))
        for column in range(engine.columns):
            for position in range(engine.step):
                self.add_input(operand_port("b", column, position, engine.step), signed(engine.b_bits))
        if engine.passes > 1:
            self.add_input("weight", unsigned(weight_bits(engine)))
            for column in range(engine.columns):
                self.add_input(f"partial_{column}", signed(engine.accumulator_bits))
        self.add_output("ready", 1)
        for column in range(engine.columns):
            self.add_output(f"result_{column}", signed(engine.accumulator_bits))
        self.add_output("result_valid", engine.columns)
        self.add_output("done", 1)

    def elaborate(self) -> Module:
        """Control, operand delivery, the grid of positions, one output stage per column."""
        module, engine = Module(), self.engine
        accept, drain, weight = self._control(module)
        if engine.passes > 1:
            entering = Signal.like(self.inputs["weight"], name="weight_entering")
            module.d.comb += entering.eq(self.inputs["weight"])
            self.held_weight = self.delayed(module, entering, 1) if engine.shares_encoders else entering
        south: list[dict[str, Any]] = [{} for _ in range(engine.columns)]
        b = [self.entering(module, "b", column, accept) for column in range(engine.columns)]
        b = [self._skewed(module, words, column, f"b_{column}") for column, words in enumerate(b)]
        for row in range(engine.rows):
            a = self._skewed(module, self.entering(module, "a", row, accept), row, f"a_{row}")
            hopping: dict[str, Any] = {"drain": drain[row]}
            if engine.passes > 1 and not engine.shares_encoders:
                hopping["weight"] = self.delayed(module, self.held_weight, row if self.hops else 0, f"weight_row_{row}")
            for column in range(engine.columns):
                out = self._position(module, row, column, a, b[column], hopping, south[column])
                if self.hops:
                    a = {key: out[f"{label(*key)}_out"] for key in a}
                    b[column] = {key: out[f"{label(*key)}_out"] for key in b[column]}
                    hopping = {name: out[f"{name}_out"] for name in hopping}
                south[column] = {state.name: out[f"{state.name}_out"] for state in states(engine)}
        self._outputs(module, south, drain[-1], weight)
        return module

    def _position(
        self, module: Module, row: int, column: int, a: Mapping[Key, Any], b: Mapping[Key, Any],
        hopping: Mapping[str, Any], north: Mapping[str, Any],
    ) -> dict[str, Any]:  # fmt: skip
        """One position (m, n): a processing element, behind its chain along K where there is one."""
        engine = self.engine
        inputs = {f"{state.name}_in": north.get(state.name, 0) for state in states(engine)}
        inputs |= {f"{name}_in": signal for name, signal in hopping.items()}
        name = f"{row}_{column}"
        if engine.chain is None:
            inputs |= {f"{label(*key)}_in": word for key, word in (*a.items(), *b.items())}
            return self.place(module, f"pe_{name}", ProcessingElement(engine), inputs)
        weight = inputs.pop("weight_in", None)
        sums: dict[str, Any] = {label(value.name, key): 0 for value, key in chain_states(engine)}
        for link in range(engine.depth):
            element = ChainElement(engine)
            given = {f"{port}_in": word for port, word in sums.items()}
            for operand in element.words_in:
                words = b if operand.name == "b" else a
                given[f"{operand.port}_in"] = words[operand.name, (link, *operand.key)]
            if weight is not None:
                given["weight_in"] = self.delayed(module, weight, link, f"weight_{name}_{link}")
            out = self.place(module, f"link_{name}_{link}", element, given)
            sums = {port: out[f"{port}_out"] for port in sums}
        inputs |= {f"{port}_in": word for port, word in sums.items()}
        return self.place(module, f"pe_{name}", ProcessingElement(engine), inputs)

    def _control(self, module: Module) -> tuple[Any, list[Any], Any]:
        """Accept operands; after the last ones of a pass have arrived, drain the rows; the weight of what drains."""
        engine, inputs = self.engine, self.inputs
        rows = engine.rows
        arrival = (rows if self.hops else 1) + engine.latency
        waiting = Signal(max(rows, arrival, 1), name="waiting")
        accept = Signal(name="accept")
        module.d.comb += [
            self.outputs["ready"].eq(~waiting[:rows].any()),
            accept.eq(inputs["valid"] & self.outputs["ready"] & ~ResetSignal()),
        ]
        module.d.sync += waiting.eq(Cat(accept & inputs["last"], waiting)[: len(waiting)])
        leaving: Any = waiting[arrival - 1]
        clearing: Any = ResetSignal()
        weight = None
        if engine.passes > 1:
            late = self.delayed(module, inputs["weight"], arrival, "weight_late")
            weight = register_like(late, "weight_draining")
            with module.If(leaving):
                module.d.sync += weight.eq(late)
        drain = [leaving | clearing]
        for row in range(1, rows):
            delayed = Signal(name=f"leaving_{row}")
            cleared = Signal(name=f"clearing_{row}", init=1)
            module.d.sync += [delayed.eq(leaving), cleared.eq(clearing)]
            leaving, clearing = waiting[arrival - 1] | delayed, cleared
            drain.append(leaving | clearing)
        if not self.hops:
            drain = [leaving | ResetSignal()] * rows
        self.leaving = leaving
        return accept, drain, weight

    def _skewed(self, module: Module, words: Mapping[Key, Any], delay: int, name: str) -> dict[Key, Any]:
        """Delay the words of a row or column: by its index when they hop, by their place in a chain along K."""
        result = {}
        for (owner, key), word in words.items():
            wait = key[0] if self.engine.chain else delay if self.hops else 0
            result[owner, key] = self.delayed(module, word, wait, label(f"{name}_{owner}", key))
        return result

    def _outputs(
        self, module: Module, south: Sequence[Mapping[str, Any]], drain: Any, weight: Any
    ) -> None:  # fmt: skip
        engine = self.engine
        later = sum(engine.output_cycles) - 1
        bias = self._bias(module, drain)
        leaving = self.leaving
        here: Any = None
        for column, words in enumerate(south):
            if column == 0 or self.hops:
                before = leaving
                here = Signal(name=f"leaving_column_{column}")  # in step with the drain signal of the last element
                module.d.sync += here.eq(before)
                leaving = here
                before = self.delayed(module, before, later, f"before_column_{column}")
                here = self.delayed(module, here, later, f"shown_column_{column}")
                if column and bias is not None:
                    bias = self.delayed(module, bias, 1, f"bias_{column}")
                if column and weight is not None:
                    weight = self.delayed(module, weight, 1, f"weight_{column}")
            stage = OutputStage(engine)
            inputs: dict[str, Any] = dict(words)
            if "bias" in stage.inputs:
                inputs["bias"] = bias
            if engine.passes > 1:
                inputs |= {"weight": weight, "partial": self.inputs[f"partial_{column}"]}
            out = self.place(module, f"output_{column}", stage, inputs)
            module.d.comb += self.outputs[f"result_{column}"].eq(out["result"])
            module.d.sync += self.outputs["result_valid"][column].eq(here)
        module.d.sync += self.outputs["done"].eq(here & ~before)

    def _bias(self, module: Module, drain: Any) -> Any:
        """What the state that leaves column 0 holds besides its sum: the bias of its steps since it was drained."""
        if "bias" not in OutputStage(self.engine).inputs:
            return None
        bias = Signal(bias_bits(self.engine), name="bias", reset_less=True)
        draining = Signal(name="draining_bias", reset_less=True)
        step = bias_per_step(self.nest)
        module.d.sync += draining.eq(drain)
        during = bias + step if self.hops else bias  # hopping rows start one cycle after each other
        module.d.sync += bias.eq(Mux(draining, Mux(drain, during, 0), bias + step))
        return bias
