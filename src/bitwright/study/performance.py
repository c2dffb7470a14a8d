"""The workload part of a study: phases mapped on an engine, as cycles, time, traffic and energy per token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from bitwright.core.machine import memory_preset
from bitwright.core.quantity import Evidence, Quantity
from bitwright.core.workload import Role, Workload
from bitwright.engine.mapping import NO_GROUPS, Groups, OperatorOnEngine, System, map_workload, schedule
from bitwright.study.file import FormatSection, Study
from bitwright.study.hardware import BuiltEngine
from bitwright.study.quality import model_source
from bitwright.study.result import Phase

_INT8 = {Role.WEIGHT: "int8", Role.ACTIVATION: "int8", Role.KV: "int8"}


def build_workloads(study: Study, folder: Path, formats: FormatSection) -> dict[str, Workload]:
    """The phases of the study in one of its formats: prefill of the prompt, and one decode step.

    A model that is a path is looked for in `folder`. Raises InputError for one that cannot be used.
    """
    from bitwright.models.trace import trace

    source, section = model_source(study.model, folder), study.workload
    prefill = trace(source, phase="prefill", batch=section.batch, tokens=section.prompt)
    decode = trace(source, phase="decode", batch=section.batch, context=section.context)
    if formats.name == "int8":
        return {"prefill": prefill.with_formats(_INT8), "decode": decode.with_formats(_INT8)}
    from bitwright.models.format_workload import in_formats

    assignment = formats.assignment
    return {"prefill": in_formats(prefill, assignment), "decode": in_formats(decode, assignment)}


def longest_sum(workloads: Mapping[str, Workload], formats: FormatSection) -> int:
    """The most products that one exact sum on the array has: over K, or over a group of scales."""
    groups = _groups(formats)
    return max(
        part.k
        for workload in workloads.values()
        for operator in workload
        for index, gemm in enumerate(operator.gemms())
        for part in (groups(operator, index) if groups else NO_GROUPS).parts(gemm)
    )


def _groups(formats: FormatSection) -> Groups | None:
    if formats.built_in:
        return None
    from bitwright.models.format_workload import scale_groups

    return scale_groups(formats.assignment)


def workload_figures(workload: Workload) -> dict[str, Quantity]:
    """What a phase computes and moves at the least, whatever it runs on."""
    source = "counted from the loop nests"
    weights = sum(size for _, size in workload.tensors(Role.WEIGHT).values())
    return {
        "products": Quantity(workload.macs, "MAC", Evidence.PREDICTED, source),
        "weights": Quantity(weights, "B", Evidence.PREDICTED, source),
        "compulsory traffic": Quantity(workload.bytes, "B", Evidence.PREDICTED, source + ", no operator fused"),
    }


def map_phase(study: Study, engine: BuiltEngine, name: str, workload: Workload, tokens: int) -> Phase:
    """One phase on one engine.

    Array cycles are exact, those of a serial engine expected from the digits of its operands. Time adds the stated
    memory and vector unit; the array's energy is that of the cycles it works, from the switching of the model's own
    operands, of its clock pins while it waits, and leakage over the whole time. The vector unit's energy is not
    included.
    """
    memory = memory_preset(study.memory)
    clock = engine.gates.max_frequency.value
    system = System(clock, study.buffer.capacity, study.vector_lanes, memory.bandwidth.value, study.memory)
    groups = _groups(study.model.format(engine.gates.formats))
    mapped = map_workload(workload, engine.engine, system, engine.statistics, groups)
    timeline = schedule(mapped, workload.edges(), system)
    cycles = sum(operator.array_cycles for operator in mapped)
    macs = sum(operator.macs for operator in mapped)
    memory_bytes = sum(operator.memory_bytes for operator in mapped)
    buffer_bytes = sum(operator.buffer_read_bytes + operator.buffer_write_bytes for operator in mapped)
    energies = _energies(study, engine, name, mapped, timeline.makespan, buffer_bytes, memory_bytes, tokens)
    array_energy = sum(figure.value for name, figure in energies.items() if name.startswith("array"))
    busy = sum(operator.busy_cycles for operator in mapped)
    counted = _cycle_evidence(engine)
    memory_note = f"{study.memory} at {memory.bandwidth.value / 1e9:g} GB/s"
    return Phase(
        engine=engine.gates.engine,
        library=engine.gates.library,
        phase=name,
        formats=engine.gates.formats,
        tokens=tokens,
        cycles=Quantity(cycles, "cycles", *counted),
        utilisation=Quantity(100 * busy / cycles, "%", counted[0], "busy share of the elements' cycles"),
        time=Quantity(timeline.makespan, "s", Evidence.PREDICTED, f"timeline with {memory_note}"),
        tokens_per_second=Quantity(tokens / timeline.makespan, "token/s", Evidence.PREDICTED, memory_note),
        array_energy_per_mac=Quantity(
            array_energy * tokens / macs,
            "J/MAC",
            Evidence.PREDICTED,
            "switching of the netlist by the model's own tensors, leakage over the predicted time",
        ),
        memory_traffic=Quantity(memory_bytes, "B", Evidence.PREDICTED, "panel schedule of the operand buffer"),
        buffer_traffic=Quantity(buffer_bytes, "B", Evidence.PREDICTED, "words that pass the edges of the array"),
        energy_per_token=Quantity(
            sum(figure.value for figure in energies.values()),
            "J",
            Evidence.PREDICTED,
            "sum of its components; the vector unit is not included",
        ),
        energies=energies,
        operators=tuple(mapped),
        schedule=timeline,
    )


def _cycle_evidence(engine: BuiltEngine) -> tuple[Evidence, str]:
    if engine.engine.serial:
        return Evidence.PREDICTED, "expected from the digits of the operands of every product, the better one encoded"
    return Evidence.SIMULATED, "closed form; equal to the simulated RTL where that was run"


def _energies(
    study: Study, engine: BuiltEngine, phase: str, mapped: Sequence[OperatorOnEngine], time_s: float,
    buffer_bytes: float, memory_bytes: float, tokens: int,
) -> Mapping[str, Quantity]:  # fmt: skip
    """Energy per token by component, joules."""
    memory = memory_preset(study.memory)
    cycles = sum(operator.array_cycles for operator in mapped)
    turned = sum(operator.encoded_cycles[1] for operator in mapped)
    switching = engine.switching_j_per_cycle[phase] * (cycles - turned) / tokens
    if turned:
        switching += engine.switching_j_per_cycle[f"{phase}, right encoded"] * turned / tokens
    waiting = max(time_s * engine.gates.max_frequency.value - cycles, 0.0)
    idle = engine.idle_j_per_cycle * waiting / tokens
    leakage = engine.leakage_w * time_s / tokens
    return {
        "array, switching": Quantity(switching, "J", Evidence.SYNTHESISED, f"activity of {phase} operands"),
        "array, idle clock": Quantity(idle, "J", Evidence.PREDICTED, "clock pins while the array waits, not gated"),
        "array, leakage": Quantity(leakage, "J", Evidence.PREDICTED, "leakage of the cells over the predicted time"),
        "operand buffer": Quantity(
            buffer_bytes * study.buffer.energy / tokens, "J", Evidence.PREDICTED, study.buffer.source
        ),
        "external memory": Quantity(
            memory_bytes * memory.energy.value / tokens, "J", Evidence.PREDICTED, memory.energy.source
        ),
    }
