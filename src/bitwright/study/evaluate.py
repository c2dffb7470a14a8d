"""Evaluate a study: model, then operands, then engines down to gates, then the workload mapped on them."""

from __future__ import annotations

import platform
from pathlib import Path

from bitwright import __version__
from bitwright.core.machine import memory_preset
from bitwright.core.progress import progress
from bitwright.engine.yosys import yosys_version
from bitwright.study.file import Study
from bitwright.study.hardware import BuiltEngine, build_engine, check_engines, longest_tile
from bitwright.study.performance import build_workloads, longest_sum, map_phase, workload_figures
from bitwright.study.quality import digit_histograms, layer_digits, measure_quality, sample_operands
from bitwright.study.result import StudyResult

_GROUPS = (
    "Where scales belong to groups of K, the array sums one group at a time; the vector unit multiplies each sum by "
    "the scales and adds it to those before."
)


def evaluate_study(study: Study, folder: Path) -> StudyResult:
    """Evaluate a study; paths in it are relative to `folder`.

    Expensive steps (running the model, synthesis, gate-level simulation) are taken from the cache when their inputs
    have not changed. Raises BitwrightError for anything that cannot be done.
    """
    memory = memory_preset(study.memory)  # what can be wrong in a study should fail before the long steps
    used = {section.formats: study.model.format(section.formats) for section in study.engines}
    workloads = {name: build_workloads(study, folder, formats) for name, formats in used.items()}
    check_engines(study, folder, {name: longest_sum(workloads[name], formats) for name, formats in used.items()})
    tokens = {"prefill": study.workload.batch * study.workload.prompt, "decode": study.workload.batch}
    with progress(f"Evaluating {study.title}", 3) as advance:
        quality = measure_quality(study.model, folder)
        operands = {name: sample_operands(study.model, folder, formats, study.seed) for name, formats in used.items()}
        advance(1)
        engines: list[BuiltEngine] = []
        for section in study.engines:
            for library in study.libraries:
                engines.append(build_engine(study, section, library, folder, operands[section.formats]))
        advance(1)
        phases = tuple(
            map_phase(study, engine, phase, workloads[engine.gates.formats][phase], tokens[phase])
            for phase in tokens
            for engine in engines
        )
        advance(1)
    figures = {
        phase if len(used) == 1 else f"{phase}, {name}": workload_figures(by_phase[phase])
        for name, by_phase in workloads.items()
        for phase in by_phase
    }
    integers = operands.get("int8", ())
    roofline = {f"{engine.gates.engine} / {engine.gates.library}": engine.gates.peak.value * 1e12 for engine in engines}
    return StudyResult(
        title=study.title,
        inputs=study.model_dump(mode="json"),
        workloads=figures,
        quality=quality,
        digits=layer_digits(integers),
        digit_histograms=digit_histograms(integers) if integers else {},
        gates=tuple(engine.gates for engine in engines),
        phases=phases,
        roofline={**roofline, "memory_bandwidth": memory.bandwidth.value},
        notes=_notes(
            study,
            memory.bandwidth.value,
            any(longest_tile(formats) for formats in used.values()),
            list(dict.fromkeys(note for each in workloads.values() for one in each.values() for note in one.notes)),
        ),
        versions={"bitwright": __version__, "python": platform.python_version(), "yosys": yosys_version()},
    )


def _notes(study: Study, bandwidth: float, grouped: bool, workload_notes: list[str]) -> tuple[str, ...]:
    return (
        f"External memory: {study.memory}, {bandwidth / 1e9:g} GB/s; operand buffer of "
        f"{study.buffer.capacity / 1024:g} KiB; vector unit of {study.vector_lanes} lanes at the array's clock. "
        f"None of the three is synthesised; the vector unit's energy is not counted, the buffer's is that of: "
        f"{study.buffer.source}.",
        "Array cycles assume operands at the array's edges when it wants them; the timeline adds the memory's time. "
        "A result goes through external memory unless the next operator runs on the vector unit and nobody else reads "
        "it.",
        f"Prefill: {study.workload.batch * study.workload.prompt} tokens; decode: {study.workload.batch} tokens after "
        f"{study.workload.context} each.",
        "Gates before placement: no wires, no clock tree, no glitches. Switching energy is that of linear-layer tiles "
        "and is applied to the attention products as well; the clock runs while the array waits.",
        *([_GROUPS] if grouped else []),
        *workload_notes,
    )
