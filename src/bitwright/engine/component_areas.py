"""Where the area of an element goes: its encoder, partial products, compressor, adders and registers.

Every component is cut out of the nest, mapped alone, and kept as small as the clock of the whole element allows. An
element is optimised as one, so the components add up to another figure than its own; the difference is shown too.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

from amaranth.hdl import Module, unsigned

from bitwright.engine.encoder_hardware import code_bits
from bitwright.engine.engine_gates import part_names
from bitwright.engine.liberty import Library
from bitwright.engine.nest import Loop, Nest, Operation, Statement, Words, rewrite, steps
from bitwright.engine.rtl import CHAIN_ELEMENT, PE, generate_part, verilog
from bitwright.engine.rtl.arithmetic import Arithmetic, Component, label, rtlil_text, shape
from bitwright.engine.rtl.elements import chain_body, step_body, weight_bits
from bitwright.engine.rtl.serial import issue_body, sparse_loop
from bitwright.engine.synthesis import synthesise
from bitwright.engine.tensor_engine import TensorEngine

COMPONENTS: dict[str, tuple[Operation, ...]] = {
    "encoder": (Operation.ENCODE,),
    "partial products": (Operation.MAP, Operation.SHIFT, Operation.MULTIPLY),
    "compressor": (Operation.HALF_REDUCE,),
    "adders": (Operation.ADD, Operation.ACCUMULATE),
}


def component_areas(engine: TensorEngine, library: Library) -> dict[str, float]:
    """Cell area (um2) of one element (one link of a chain) by component.

    Keys: the components its steps need, "registers", and "optimised together", what mapping the element as a whole adds
    or saves. What engines share among elements (digit streams, output stages) is listed under the module's name.
    Raises as `rtl.generate_part` and `synthesis.synthesise`.
    """
    name = CHAIN_ELEMENT if engine.chain else PE
    element = synthesise(generate_part(engine, name), name, library)
    found: dict[str, float] = {}
    body = _element_body(engine)
    for component, operations in COMPONENTS.items():
        kept = rewrite(
            body, lambda item, wanted=operations: (  # type: ignore[misc]
                (item,) if isinstance(item, Loop) or item.operation in wanted else ()
            )
        )  # fmt: skip
        if not kept:
            continue
        module = _Cut(engine, kept)
        source = verilog({module.name: rtlil_text(module)})
        found[component] = synthesise(source, module.name, library, within_s=element.period_s).area_um2
    found["registers"] = element.sequential_area_um2
    found["optimised together"] = element.area_um2 - sum(found.values())
    for part in part_names(engine):
        if part != name:
            found[part] = synthesise(generate_part(engine, part), part, library).area_um2
    return found


def _element_body(engine: TensorEngine) -> Sequence[Statement]:
    if engine.serial:
        return issue_body(engine)
    return chain_body(engine) if engine.chain else step_body(engine.nest)


class _Cut(Component):
    """Some steps of a body as a module: what they read comes from ports, what they make goes to ports."""

    name = "component"

    def __init__(self, engine: TensorEngine, body: Sequence[Statement]) -> None:
        super().__init__()
        self.engine, self.body = engine, body

    def elaborate(self) -> Module:
        """The steps between ports; everything they make is an output."""
        module, engine, nest = Module(), self.engine, self.engine.nest
        weight = self.inputs.get("weight")
        words: Words = {key: self.inputs[label(*key)] for key in self._keys(self._read())}
        fixed = {sparse_loop(engine).index: 0} if engine.serial else {"kp": 0}
        after = Arithmetic(module, nest, weight, issued=engine.serial).build(self.body, words, fixed)
        for name, key in self._keys(self._made()):
            module.d.comb += self.outputs[self._output(name, key)].eq(after[name, key])
        return module

    def _read(self) -> list[str]:
        made = set(self._made())
        read = dict.fromkeys(name for step in steps(self.body) for name in step.inputs)
        states = {state.name for state in self.engine.nest.states}
        return [name for name in read if name not in made or name in states]

    def _made(self) -> list[str]:
        return list(dict.fromkeys(name for step in steps(self.body) for name in step.outputs))

    def _keys(self, names: Sequence[str]) -> list[tuple[str, tuple[int, ...]]]:
        nest: Nest = self.engine.nest
        single = {sparse_loop(self.engine).index} if self.engine.serial else {"kp"} if self.engine.chain else set()
        return [
            (name, key) for name in names
            for key in product(*(range(1 if index in single else nest.extent(index)) for index in nest.words[name].per))
        ]  # fmt: skip

    def _output(self, name: str, key: tuple[int, ...]) -> str:
        port = label(name, key)
        return f"{port}_next" if port in self.inputs else port

    @property
    def ports(self) -> list[object]:
        """All ports, made from the words the steps read and make."""
        engine, nest = self.engine, self.engine.nest
        for name, key in self._keys(self._read()):
            form = shape(nest.words[name])
            if name == "d":
                form = unsigned(2 if engine.serial else code_bits(str(nest.encoding)))
            self.add_input(label(name, key), form)
        encodes = any(step.operation is Operation.ENCODE for step in steps(self.body))
        if encodes and engine.passes > 1:
            self.add_input("weight", unsigned(weight_bits(engine)))
        for name, key in self._keys(self._made()):
            form = unsigned(code_bits(str(nest.encoding))) if name == "d" else shape(nest.words[name])
            self.add_output(self._output(name, key), form)
        return super().ports
