"""The weight-stationary array: B stays, rows of A stream through, running sums travel along K.

Module `tensor_engine`: `rst`, `load` with `b_<column>` (D = depth cycles, the last row of the tile first), `valid` with
`a_<k>` (one row of A), `first` with the first row of a tile (takes the loaded B over), `partial_<column>` (the sum of
the tiles before, zero for the first) -> `result_<column>`, `result_valid` (one bit per column). Column j is j cycles
later than column 0: it expects `partial_<j>` 1 + L + j cycles after its row of A, and shows the result
D + 1 + O + L + j cycles after it (L: pipeline stages and a shared encoder, O: cycles of the output stage). The next
tile may be loaded from D cycles after `first` on. Where an element takes several positions of K, at one bit weight at a
time, `a_0_<k>` and `b_<column>_<i>` hold them, `weight` is the bit weight of the row, and `partial_<j>` is needed
`output_cycles[1]` cycles before its result instead.
"""

from __future__ import annotations

from typing import Any

from amaranth.hdl import Const, Module, Mux, ResetSignal, Signal, signed, unsigned

from bitwright.engine.evaluate import bias_per_step
from bitwright.engine.rtl.arithmetic import label
from bitwright.engine.rtl.elements import (
    ChainElement,
    OutputStage,
    bias_bits,
    chain_states,
    operands,
    positions,
    weight_bits,
)
from bitwright.engine.rtl.grid import Assembly, operand_port
from bitwright.engine.tensor_engine import TensorEngine


class WeightStationary(Assembly):
    """The module of a weight-stationary engine; see the module docstring."""

    def __init__(self, engine: TensorEngine, instances: bool = False) -> None:
        super().__init__(engine, instances)
        for port in ("load", "valid", "first"):
            self.add_input(port, 1)
        if engine.passes > 1:
            self.add_input("weight", unsigned(weight_bits(engine)))
        for position in range(engine.step):
            self.add_input(operand_port("a", 0, position, engine.step), signed(engine.a_bits))
        for column in range(engine.columns):
            for word in operands(engine)[1]:
                self.add_input(label("b", (column, *word.key)), signed(engine.b_bits))
            self.add_input(f"partial_{column}", signed(engine.accumulator_bits))
        for column in range(engine.columns):
            self.add_output(f"result_{column}", signed(engine.accumulator_bits))
        self.add_output("result_valid", engine.columns)

    def elaborate(self) -> Module:
        """Skews, the grid of links, one output stage per column."""
        module, engine = Module(), self.engine
        accept = Signal(name="accept")
        module.d.comb += accept.eq(self.inputs["valid"] & ~ResetSignal())
        first = Signal(name="first_accepted")
        module.d.comb += first.eq(accept & self.inputs["first"])
        first = self.delayed(module, first, int(engine.shares_encoders))
        load: Any = self.inputs["load"]
        loads, south, sums = [], [], []
        for column in range(engine.columns):
            loads.append(load)
            load = self.delayed(module, load, 1, f"load_{column}")
            b = {word.port: self.inputs[label("b", (column, *word.key))] for word in operands(engine)[1]}
            south.append({port: self.delayed(module, word, column, f"{port}_{column}") for port, word in b.items()})
            names = [label(value.name, key) for value, key in chain_states(engine)]
            # The sum so far enters at the north; with several passes the output stage adds it, shifted sums in hand.
            north = {names[0]: self.inputs[f"partial_{column}"]} if engine.passes == 1 else {}
            sums.append({name: north.get(name, Const(0)) for name in names})
        weight = self.inputs.get("weight")
        if weight is not None:
            self.held_weight = self.delayed(module, weight, 1, "weight_entering")
            weight = self.delayed(module, weight, engine.latency + engine.depth + 1, "weight_draining")
        entering = self.entering_rows(module, accept)
        for link in range(engine.depth):
            words = {name: self.delayed(module, word, link, f"{name}_{link}") for name, word in entering[link].items()}
            first_here = self.delayed(module, first, link, f"first_{link}") if link else first
            for column in range(engine.columns):
                inputs = {f"{name}_in": word for name, word in (*words.items(), *sums[column].items())}
                inputs |= {f"{port}_in": word for port, word in south[column].items()}
                inputs |= {"load_in": loads[column], "first_in": first_here}
                out = self.place(module, f"link_{link}_{column}", ChainElement(engine), inputs)
                words = {name: out[f"{name}_out"] for name in words}
                sums[column] = {name: out[f"{name}_out"] for name in sums[column]}
                south[column] = {port: out[f"{port}_out"] for port in south[column]}
                first_here = out["first_out"]
        shown = self.delayed(module, accept, engine.latency + engine.depth + sum(engine.output_cycles), "accepted")
        for column in range(engine.columns):
            stage = OutputStage(engine)
            given: dict[str, Any] = dict(sums[column])
            if "bias" in stage.inputs:
                given["bias"] = Const(bias_per_step(self.nest) % (1 << bias_bits(engine)), bias_bits(engine))
            if weight is not None:
                given |= {"weight": weight, "partial": self.inputs[f"partial_{column}"]}
                weight = self.delayed(module, weight, 1, f"weight_{column}")
            out = self.place(module, f"output_{column}", stage, given)
            module.d.comb += self.outputs[f"result_{column}"].eq(out["result"])
            module.d.sync += self.outputs["result_valid"][column].eq(shown)
            shown = self.delayed(module, shown, 1, f"shown_{column}")
        return module

    def entering_rows(self, module: Module, accept: Any) -> list[dict[str, Any]]:
        """The word of A, or its codes, for each link, by port name."""
        if self.engine.shares_encoders:
            words = self.entering(module, "a", 0, accept)
            return [
                {item.port: words[item.name, (link, *item.key)] for item in operands(self.engine)[0]}
                for link in range(self.engine.depth)
            ]
        along = self.nest.loop("kp").stride
        found: list[dict[str, Any]] = []
        for link in range(self.engine.depth):
            row: dict[str, Any] = {}
            for key, offset in positions(self.nest, "a"):
                port = operand_port("a", 0, link * along + offset, self.engine.step)
                word = Signal(signed(self.engine.a_bits), name=f"{port}_entering")
                module.d.comb += word.eq(Mux(accept, self.inputs[port], 0))
                row[label("a", key)] = word
            found.append(row)
        return found
