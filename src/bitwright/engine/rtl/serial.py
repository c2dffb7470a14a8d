"""The engines that issue non-zero digits one after the other: columns of elements that share one row of A.

Module `tensor_engine` with `rows` columns (M) of `columns` elements (N); column j has one digit stream per lane l:
`valid_<j>_<l>`, `last_<j>_<l>` and the operands of a group `a_<j>_<l>_<i>` -> `ready_<j>_<l>`; `position_<j>_<l>` is
the place in the group of the digit that is issued in this cycle, for which `b_<j>_<n>_<l>` must hold the operand of
element n one cycle later. `weight_<j>` is the bit weight of the groups, `block_<j>` is 1 with the groups of the last
pass of a block of K. A pass ends with its `last` groups; the column then drains for as many cycles as it has elements
(from the last element to the first): `result_<j>`, valid with bit j of `result_valid`, takes the sum of the passes
before from `partial_<j>` `output_cycles[1]` cycles earlier. After the last pass of a block all columns wait for each
other (`synchronised`).

A group takes max(1, non-zero digits) cycles; a digit reaches the state three cycles after its group was accepted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from amaranth.hdl import Cat, Module, Mux, ResetSignal, Signal, signed, unsigned

from bitwright.engine.encoder_hardware import nonzero, select_code, sparse_encoder
from bitwright.engine.evaluate import bias_per_step
from bitwright.engine.nest import Loop, Statement, Words, loops
from bitwright.engine.rtl.arithmetic import Arithmetic, Component, choose, shape
from bitwright.engine.rtl.elements import OutputStage, bias_bits, register_like, states, weight_bits
from bitwright.engine.rtl.grid import Assembly
from bitwright.engine.tensor_engine import TensorEngine


def sparse_loop(engine: TensorEngine) -> Loop:
    """The loop over non-zero digits of a serial engine."""
    return next(loop for loop in loops(engine.nest.body) if loop.sparse)


def issue_body(engine: TensorEngine) -> tuple[Statement, ...]:
    """What one element does with the digits issued in one cycle."""
    body = sparse_loop(engine).body
    while len(body) == 1 and isinstance(body[0], Loop) and body[0].dimension in ("M", "N"):
        body = body[0].body
    return body


def group(engine: TensorEngine) -> int:
    """Operands of a group."""
    return sparse_loop(engine).extent or 1


def lane_count(engine: TensorEngine) -> int:
    """Digit streams of a column."""
    return engine.nest.extent("lane")


class _Stream:
    """The logic of one digit stream, added to a module: `inputs` are its control and operand signals by port name."""

    def __init__(self, module: Module, engine: TensorEngine, inputs: Mapping[str, Any], name: str) -> None:
        size, encoding = group(engine), str(engine.nest.encoding)
        arithmetic = Arithmetic(module, engine.nest, inputs["weight"])
        digit = engine.nest.words["d"]
        codes = [arithmetic.encode([inputs[f"a_{at}"]], 0, [digit])[0] for at in range(size)]
        held = [register_like(code, f"{name}code_{at}") for at, code in enumerate(codes)]
        pending = Signal(size, name=f"{name}pending")
        busy, last = Signal(name=f"{name}busy"), Signal(name=f"{name}last_group", reset_less=True)
        chosen = sparse_encoder(module, [pending[at] for at in range(size)], f"{name}sparse")
        self.position = chosen.position[0]
        finishing = Signal(name=f"{name}finishing")
        self.ready = Signal(name=f"{name}may_enter")
        self.ending = Signal(name=f"{name}ends")
        accept = Signal(name=f"{name}enters")
        module.d.comb += [
            finishing.eq(busy & (chosen.count <= 1)),
            self.ready.eq(~inputs["blocked"] & (~busy | (finishing & ~last))),
            self.ending.eq(finishing & last),
            accept.eq(inputs["valid"] & self.ready & ~inputs["clear"]),
        ]
        issued = Signal.like(held[0], name=f"{name}issued")
        module.d.comb += issued.eq(choose(self.position, held))
        lowest = pending & ~(pending - 1)[:size]
        with module.If(accept):
            module.d.sync += [busy.eq(1), last.eq(inputs["last"])]
            module.d.sync += pending.eq(Cat(nonzero(code, encoding) for code in codes))
            module.d.sync += [register.eq(code) for register, code in zip(held, codes, strict=True)]
        with module.Elif(inputs["clear"] | finishing):
            module.d.sync += [busy.eq(0), pending.eq(0)]
        with module.Else():
            module.d.sync += pending.eq(pending & ~lowest)
        with module.If(inputs["clear"]):  # nothing undefined reaches the elements before the first group
            module.d.sync += [register.eq(0) for register in held]
        self.select = Signal(2, name=f"{name}select", reset_less=True)
        self.active = Signal(name=f"{name}active", reset_less=True)
        module.d.sync += [
            self.select.eq(select_code(module, encoding, issued, f"{name}select_now")),
            self.active.eq(busy & pending.any()),
        ]


_CONTROL = ("valid", "last", "blocked", "clear")


class DigitStream(Component):
    """The module `digit_stream`: encoders, sparse encoder and group registers that all elements of a column share."""

    name = "digit_stream"

    def __init__(self, engine: TensorEngine) -> None:
        super().__init__()
        self.engine = engine
        for port in _CONTROL:
            self.add_input(port, 1)
        self.add_input("weight", unsigned(weight_bits(engine)))
        for at in range(group(engine)):
            self.add_input(f"a_{at}", signed(engine.a_bits))
        self.add_output("ready", 1)
        self.add_output("position", max(1, (group(engine) - 1).bit_length()))
        self.add_output("ending", 1)
        self.add_output("select", 2)
        self.add_output("active", 1)

    def elaborate(self) -> Module:
        """The stream and its ports."""
        module = Module()
        stream = _Stream(module, self.engine, self.inputs, "")
        module.d.comb += [port.eq(getattr(stream, name)) for name, port in self.outputs.items()]
        return module


class SerialElement(Component):
    """The module `pe` of a serial engine: per lane `b_<l>_in` with `select_<l>_in`, `active_<l>_in` from the column's
    stream, or (encoders not shared) with a stream of its own; `drain_in`, `<state>_in` -> `<state>_out`."""

    name = "pe"

    def __init__(self, engine: TensorEngine) -> None:
        super().__init__()
        self.engine = engine
        self.own = not engine.shares_encoders
        for lane in range(lane_count(engine)):
            self.add_input(f"b_{lane}_in", signed(engine.b_bits))
            if self.own:
                for port in _CONTROL[:2]:
                    self.add_input(f"{port}_{lane}", 1)
                self.add_input(f"blocked_{lane}", 1)
                for at in range(group(engine)):
                    self.add_input(f"a_{lane}_{at}", signed(engine.a_bits))
                for port, bits in (("ready", 1), ("position", max(1, (group(engine) - 1).bit_length())), ("ending", 1)):
                    self.add_output(f"{port}_{lane}", bits)
            else:
                self.add_input(f"select_{lane}_in", 2)
                self.add_input(f"active_{lane}_in", 1)
        if self.own:
            self.add_input("clear", 1)
            self.add_input("weight", unsigned(weight_bits(engine)))
        self.add_input("drain_in", 1)
        for state in states(engine):
            self.add_input(f"{state.name}_in", shape(state))
            self.add_output(f"{state.name}_out", shape(state), reset_less=True)

    def elaborate(self) -> Module:
        """Operand registers, the body of the loop over non-zero digits, state registers."""
        module, engine = Module(), self.engine
        per = engine.nest.words["b"].per
        words: Words = {}
        for lane in range(lane_count(engine)):
            if self.own:
                wires = {port: self.inputs[f"{port}_{lane}"] for port in ("valid", "last", "blocked")}
                wires |= {"clear": self.inputs["clear"], "weight": self.inputs["weight"]}
                wires |= {f"a_{at}": self.inputs[f"a_{lane}_{at}"] for at in range(group(engine))}
                stream = _Stream(module, engine, wires, f"lane_{lane}_")
                module.d.comb += [
                    self.outputs[f"{port}_{lane}"].eq(getattr(stream, port)) for port in ("ready", "position", "ending")
                ]
                select, active = stream.select, stream.active
            else:
                select, active = self.inputs[f"select_{lane}_in"], self.inputs[f"active_{lane}_in"]
            b = register_like(self.inputs[f"b_{lane}_in"], f"b_{lane}")
            code = register_like(select, f"select_{lane}_held")
            module.d.sync += [b.eq(Mux(active, self.inputs[f"b_{lane}_in"], 0)), code.eq(select)]
            key = tuple(lane if index == "lane" else 0 for index in per)
            words["b", key], words["d", key] = b, code
        draining = Signal(name="drain", reset_less=True)
        module.d.sync += draining.eq(self.inputs["drain_in"])
        kept = states(engine)
        words |= {(state.name, ()): self.outputs[f"{state.name}_out"] for state in kept}
        arithmetic = Arithmetic(module, engine.nest, issued=True)
        after = arithmetic.build(issue_body(engine), words, {sparse_loop(engine).index: 0})
        for state in kept:
            following = Mux(draining, self.inputs[f"{state.name}_in"], after[state.name, ()])
            module.d.sync += self.outputs[f"{state.name}_out"].eq(following)
        return module


def serial_parts(engine: TensorEngine) -> list[Component]:
    """The modules a serial engine is made of."""
    stream: list[Component] = [DigitStream(engine)] if engine.shares_encoders else []
    return [*stream, SerialElement(engine), OutputStage(engine)]


class SerialColumns(Assembly):
    """The module of a serial engine; see the module docstring."""

    def __init__(self, engine: TensorEngine, instances: bool = False) -> None:
        super().__init__(engine, instances)
        lanes = lane_count(engine)
        for column in range(engine.rows):
            self.add_input(f"weight_{column}", unsigned(weight_bits(engine)))
            self.add_input(f"block_{column}", 1)
            self.add_input(f"partial_{column}", signed(engine.accumulator_bits))
            for lane in range(lanes):
                self.add_input(f"valid_{column}_{lane}", 1)
                self.add_input(f"last_{column}_{lane}", 1)
                for at in range(group(engine)):
                    self.add_input(f"a_{column}_{lane}_{at}", signed(engine.a_bits))
                for element in range(engine.columns):
                    self.add_input(f"b_{column}_{element}_{lane}", signed(engine.b_bits))
                self.add_output(f"ready_{column}_{lane}", 1)
                self.add_output(f"position_{column}_{lane}", max(1, (group(engine) - 1).bit_length()))
            self.add_output(f"result_{column}", signed(engine.accumulator_bits))
        self.add_output("result_valid", engine.rows)
        self.add_output("synchronised", 1)

    def elaborate(self) -> Module:
        """The columns, and the barrier at the end of a block."""
        module, engine = Module(), self.engine
        size = engine.columns
        synchronised = Signal(name="all_ended")
        since_sync = Signal(size, name="since_all_ended")
        module.d.sync += since_sync.eq(Cat(synchronised, since_sync)[:size])
        ended = [self._column(module, column, since_sync[size - 1]) for column in range(engine.rows)]
        module.d.comb += [
            synchronised.eq(Cat(signal for signal, _ in ended).all() & ~ResetSignal()),
            self.outputs["synchronised"].eq(synchronised),
        ]
        for _, flag in ended:
            with module.If(synchronised | ResetSignal()):
                module.d.sync += flag.eq(0)
        return module

    def _column(self, module: Module, column: int, released: Any) -> tuple[Any, Any]:
        """One column; whether it has ended its block (this cycle or before), and the register that remembers."""
        engine, inputs = self.engine, self.inputs
        lanes, size = lane_count(engine), engine.columns
        blocked = [Signal(name=f"blocked_{column}_{lane}") for lane in range(lanes)]
        drain = Signal(name=f"drain_{column}")
        streams, elements = self._streams(module, column, blocked), []
        north: dict[str, Any] = {}
        for element in range(size):
            given = {f"{state.name}_in": north.get(state.name, 0) for state in states(engine)}
            given["drain_in"] = drain
            for lane in range(lanes):
                given[f"b_{lane}_in"] = inputs[f"b_{column}_{element}_{lane}"]
                if engine.shares_encoders:
                    given[f"select_{lane}_in"] = streams[lane]["select"]
                    given[f"active_{lane}_in"] = streams[lane]["active"]
                else:
                    given |= {f"{port}_{lane}": inputs[f"{port}_{column}_{lane}"] for port in ("valid", "last")}
                    given[f"blocked_{lane}"] = blocked[lane]
                    given |= {f"a_{lane}_{at}": inputs[f"a_{column}_{lane}_{at}"] for at in range(group(engine))}
            if not engine.shares_encoders:
                given |= {"clear": ResetSignal(), "weight": inputs[f"weight_{column}"]}
            out = self.place(module, f"pe_{column}_{element}", SerialElement(engine), given)
            elements.append(out)
            north = {state.name: out[f"{state.name}_out"] for state in states(engine)}
        if not engine.shares_encoders:  # all elements of a column go in step: the first one speaks for them
            streams = [
                {port: elements[0][f"{port}_{lane}"] for port in ("ready", "position", "ending")}
                for lane in range(lanes)
            ]
        for lane in range(lanes):
            module.d.comb += [
                self.outputs[f"ready_{column}_{lane}"].eq(streams[lane]["ready"]),
                self.outputs[f"position_{column}_{lane}"].eq(streams[lane]["position"]),
            ]
        return self._passes(module, column, streams, blocked, drain, north, released)

    def _streams(self, module: Module, column: int, blocked: list[Any]) -> list[dict[str, Any]]:
        if not self.engine.shares_encoders:
            return []
        found = []
        for lane, block in enumerate(blocked):
            given = {port: self.inputs[f"{port}_{column}_{lane}"] for port in ("valid", "last")}
            given |= {"blocked": block, "clear": ResetSignal(), "weight": self.inputs[f"weight_{column}"]}
            given |= {f"a_{at}": self.inputs[f"a_{column}_{lane}_{at}"] for at in range(group(self.engine))}
            found.append(self.place(module, f"stream_{column}_{lane}", DigitStream(self.engine), given))
        return found

    def _passes(
        self, module: Module, column: int, streams: list[dict[str, Any]], blocked: list[Any], drain: Any,
        south: Mapping[str, Any], released: Any,
    ) -> tuple[Any, Any]:  # fmt: skip
        """End a pass when all lanes have, drain it, and let the next one in; wait for all columns after a block."""
        engine = self.engine
        size, late = engine.columns, 1 + engine.latency - engine.shares_encoders
        ended = [Signal(name=f"ended_{column}_{lane}") for lane in range(len(streams))]
        over = [flag | stream["ending"] for flag, stream in zip(ended, streams, strict=True)]
        done = Signal(name=f"pass_ends_{column}")
        module.d.comb += done.eq(Cat(over).all() & Cat(stream["ending"] for stream in streams).any())
        since = Signal(size + late, name=f"since_pass_{column}")
        module.d.sync += since.eq(Cat(done, since)[: len(since)])
        # The last pass of a block is known from its groups; what it ended stays until the barrier lets go.
        in_block = Signal(name=f"in_block_{column}")
        entering = Cat(self.inputs[f"valid_{column}_{lane}"] & streams[lane]["ready"] for lane in range(len(streams)))
        with module.If(entering.any()):
            module.d.sync += in_block.eq(self.inputs[f"block_{column}"])
        at_barrier = Signal(name=f"at_barrier_{column}")
        waits = Signal(name=f"waits_{column}")
        with module.If(done & in_block):
            module.d.sync += [at_barrier.eq(1), waits.eq(1)]
        with module.Elif(released):
            module.d.sync += waits.eq(0)
        opens = Mux(waits, released, since[size - 1] & ~in_block)
        for flag, stream, block in zip(ended, streams, blocked, strict=True):
            module.d.comb += block.eq(flag & ~opens)
            with module.If(stream["ending"]):
                module.d.sync += flag.eq(1)
            with module.Elif(opens):
                module.d.sync += flag.eq(0)
        leaving = since[late : late + size].any()
        module.d.comb += drain.eq(leaving | ResetSignal())
        weight = self.delayed(module, register_like(self.inputs[f"weight_{column}"], f"weight_now_{column}"), 0)
        with module.If(entering.any()):
            module.d.sync += weight.eq(self.inputs[f"weight_{column}"])
        weight_late = self.delayed(module, weight, late + 1, f"weight_late_{column}")
        draining = register_like(weight, f"weight_draining_{column}")
        with module.If(since[late]):
            module.d.sync += draining.eq(weight_late)
        stage = OutputStage(engine)
        given: dict[str, Any] = dict(south) | {"weight": draining, "partial": self.inputs[f"partial_{column}"]}
        if "bias" in stage.inputs:
            given["bias"] = self._bias(module, column, drain)
        out = self.place(module, f"output_{column}", stage, given)
        here = Signal(name=f"leaving_column_{column}")
        module.d.sync += here.eq(leaving)
        summed = self.delayed(module, here, sum(engine.output_cycles) - 1, f"summed_{column}")
        module.d.comb += self.outputs[f"result_{column}"].eq(out["result"])
        module.d.sync += self.outputs["result_valid"][column].eq(summed)
        return at_barrier | (done & in_block), at_barrier

    def _bias(self, module: Module, column: int, drain: Any) -> Any:
        """What every state of a column holds besides its sum; see `rtl.grid`."""
        bias = Signal(bias_bits(self.engine), name=f"bias_{column}", reset_less=True)
        draining = Signal(name=f"draining_bias_{column}", reset_less=True)
        module.d.sync += draining.eq(drain)
        step = bias_per_step(self.nest)
        module.d.sync += bias.eq(Mux(draining, Mux(drain, bias, 0), bias + step))
        return bias
