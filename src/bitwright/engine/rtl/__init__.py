"""Hardware of tensor engines, generated from their nests, as RTLIL, as Verilog and for simulation.

All words are two's complement, everything happens on the rising edge of `clk`. The top module `tensor_engine` is
described in `rtl.grid`, `rtl.weight_stationary` and `rtl.serial`, its parts in `rtl.elements`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from amaranth.hdl import Elaboratable

from bitwright.core.errors import InputError
from bitwright.engine.hardware_rules import check_hardware
from bitwright.engine.rtl.arithmetic import Arithmetic, Component, Design, rtlil_text
from bitwright.engine.rtl.elements import (
    CHAIN_ELEMENT,
    OUTPUT_STAGE,
    PE,
    ChainElement,
    OutputStage,
    ProcessingElement,
    states,
)
from bitwright.engine.rtl.grid import TOP, Assembly, Grid
from bitwright.engine.rtl.serial import SerialColumns, serial_parts
from bitwright.engine.rtl.weight_stationary import WeightStationary
from bitwright.engine.tensor_engine import TensorEngine
from bitwright.engine.yosys import run_yosys

_MOST_INPUT_BITS = 1 << 16  # Amaranth 0.5
__all__ = [
    "CHAIN_ELEMENT", "OUTPUT_STAGE", "PE", "TOP", "Arithmetic", "Component", "generate",
    "generate_part", "generate_rtlil", "parts", "reset_cycles", "rtlil_text", "simulation_design", "top", "verilog",
]  # fmt: skip


def reset_cycles(engine: TensorEngine) -> int:
    """Cycles `rst` must be held so that every state is zero and every pipeline register is filled."""
    return engine.rows + engine.columns + engine.depth + 2 * engine.latency + sum(engine.output_cycles) + 4


def parts(engine: TensorEngine) -> list[Component]:
    """The modules that the top module is made of."""
    check_hardware(engine)
    if engine.serial:
        return serial_parts(engine)
    elements: list[Component] = []
    if engine.chain is not None:
        elements.append(ChainElement(engine))
    if engine.dataflow != "ws":
        elements.append(ProcessingElement(engine))
    return [*elements, OutputStage(engine)]


def top(engine: TensorEngine, instances: bool = False) -> Assembly:
    """The module `tensor_engine`; with `instances` its parts are only referred to by name."""
    check_hardware(engine)
    kind = SerialColumns if engine.serial else WeightStationary if engine.dataflow == "ws" else Grid
    made = kind(engine, instances)
    bits = sum(len(port) for port in made.inputs.values())
    if bits >= _MOST_INPUT_BITS:
        raise InputError(
            f"{engine.nest.name}, {engine.rows}x{engine.columns}: {bits:,} bits of input ports are more than the "
            f"hardware generator takes ({_MOST_INPUT_BITS - 1:,}); build it from smaller engines."
        )
    return made


def simulation_design(engine: TensorEngine) -> tuple[Elaboratable, dict[str, Any]]:
    """The whole engine for Amaranth's simulator, and its ports by name. Registers start at zero there."""
    component = top(engine)
    return Design(component), {**component.inputs, **component.outputs}


def generate_rtlil(engine: TensorEngine) -> dict[str, str]:
    """RTLIL of each module of the engine, by module name."""
    found = {part.name: rtlil_text(part) for part in parts(engine)}
    return found | {TOP: rtlil_text(top(engine, instances=True), resettable=True)}


def generate(engine: TensorEngine) -> str:
    """Readable Verilog of all modules of the engine.

    Raises InputError for nests without hardware (see `hardware_rules.check_hardware`), ToolError when Yosys is missing.
    """
    return verilog(generate_rtlil(engine))


def generate_part(engine: TensorEngine, name: str = PE, drains: bool = True) -> str:
    """Readable Verilog of one module of the engine. Raises as `generate`, and InputError for another name.

    Without `drains`, no neighbour drains through the module: its states are cleared instead, as in the first row of an
    array.
    """
    found = {part.name: part for part in parts(engine)}
    if name not in found:
        raise InputError(f"This engine has the parts {', '.join(found)}, not {name!r}.")
    neighbour = () if drains else tuple(f"{state.name}_in" for state in states(engine))
    return verilog({name: rtlil_text(found[name], zero=neighbour)})


def verilog(modules: Mapping[str, str]) -> str:
    """Verilog of RTLIL modules."""
    reads = "".join(f"read_rtlil {name}.il\n" for name in modules)
    script = f"{reads}proc -norom\nsetattr -unset init w:*\nwrite_verilog -norename -noattr engine.v\n"
    return run_yosys(script, {f"{name}.il": text for name, text in modules.items()}, ["engine.v"], 300)["engine.v"]
