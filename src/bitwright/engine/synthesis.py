"""Logic synthesis with Yosys and ABC, mapped to a cell library and timed with our own static timing.

Recipe: generic optimisation once; then ABC with each of the scripts below, at a delay target of 100 ps that is never
met (with these scripts, relaxed targets were measured to give the same netlists). That is the documented frequency
search: the smallest register-to-register period among the candidates is the maximum frequency, and the candidate that
is best for the stated objective is kept. No wires, no clock tree (nothing is placed).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from bitwright.core import cache
from bitwright.core.errors import InputError
from bitwright.core.progress import progress
from bitwright.core.quantity import Evidence
from bitwright.engine.liberty import Library
from bitwright.engine.netlist import Netlist, join, read_netlist
from bitwright.engine.timing import TimingReport, analyse_timing
from bitwright.engine.yosys import YosysJob, run_yosys, run_yosys_jobs, yosys_version

Objective = Literal["area_delay", "area", "delay"]
_RECIPE_VERSION = 2
_TARGET_PS = 100
_SLACK = 0.8  # share of the period for parts whose paths start in another part's register
_PREPARE = """hierarchy -check -top {top}
proc
flatten
setattr -unset init w:*
opt
wreduce
alumacc
share
opt
memory
opt
maccmap
techmap
opt -full
dfflegalize -cell $_DFF_P_ x
opt_clean
dfflibmap -liberty cells.lib
opt
setundef -zero
opt_clean -purge
write_rtlil prepared.il
"""
_MODULE = re.compile(r"^\s*module\s+([A-Za-z_][\w$]*).*?\bendmodule\b", re.M | re.S)
_SIZE = "upsize {D}; dnsize {D}"
SCRIPTS: dict[str, str] = {
    "a": f"strash; dch; map -B 0.9 {{D}}; topo; buffer -c -N 8; {_SIZE}",
    "b": f"strash; dch; dch -f; map -B 0.8 {{D}}; topo; buffer -c -N 5; {_SIZE}",
    "c": f"&get -n; &st; &dch; &nf; &put; buffer -c -N 8; topo; {_SIZE}",
    "d": f"&get -n; &st; &syn3; &syn3; &dch; &nf; &put; buffer -c -N 6; topo; {_SIZE}",
    "area": "strash; ifraig; scorr; dc2; dc2; strash; dch -f; map -a; topo; buffer -c -N 16; dnsize {D}",
}


@dataclass(frozen=True)
class Candidate:
    """One mapping tried: ABC script, its delay target, cell area, register-to-register period (None without one)."""

    script: str
    target_ps: int
    area_um2: float
    period_s: float | None


@dataclass(frozen=True)
class GateReport:
    """A module mapped to cells. Period and frequency are None for a module without register-to-register paths.

    `netlist_json` is the mapped netlist in Yosys JSON; `netlist()` reads it.
    """

    top: str
    library: str
    library_digest: str
    tool: str
    objective: str
    recipe: str
    area_um2: float
    sequential_area_um2: float
    leakage_w: float
    period_s: float | None
    best_period_s: float | None
    longest_path_s: float
    cells: Mapping[str, int]
    candidates: tuple[Candidate, ...]
    boxes: tuple[str, ...] = ()
    netlist_json: str = field(default="", repr=False)
    evidence: Evidence = Evidence.SYNTHESISED

    @property
    def combinational_area_um2(self) -> float:
        """Cell area without the flip-flops."""
        return self.area_um2 - self.sequential_area_um2

    @property
    def frequency_hz(self) -> float | None:
        """Frequency of the netlist that was kept."""
        return 1 / self.period_s if self.period_s else None

    @property
    def maximum_frequency_hz(self) -> float | None:
        """Highest frequency of any candidate of the search, whatever its area."""
        return 1 / self.best_period_s if self.best_period_s else None

    def netlist(self, library: Library) -> Netlist:
        """The mapped netlist. Raises InputError for another library than it was mapped to."""
        if library.digest != self.library_digest:
            raise InputError(f"{self.top} was mapped to {self.library}, not to this {library.name}.")
        return read_netlist(self.netlist_json, self.top, library, self.boxes)

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON types, the netlist included."""
        out = {name: getattr(self, name) for name in self.__dataclass_fields__}
        out["candidates"] = [vars(candidate) for candidate in self.candidates]
        out |= {"cells": dict(self.cells), "boxes": list(self.boxes), "evidence": str(self.evidence)}
        return out

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> GateReport:
        """The report that `to_json` wrote."""
        candidates = tuple(Candidate(**candidate) for candidate in data["candidates"])
        changed = {"candidates": candidates, "boxes": tuple(data["boxes"]), "evidence": Evidence(data["evidence"])}
        return cls(**{**data, **changed})


def synthesise(
    source: str,
    top: str,
    library: Library,
    objective: Objective = "area_delay",
    boxes: Sequence[str] = (),
    parallel: int | None = None,
    timeout_s: float = 600,
    within_s: float | None = None,
) -> GateReport:
    """Map the module `top` of `source` (Verilog, or RTLIL text) to `library`; modules named in `boxes` stay boxes.

    With `within_s`, the smallest mapping whose longest path, ports included, does not exceed it is kept, the fastest
    when none is that fast: a port may stand next to a register of another module.

    The result is cached by content. Raises InputError for an unusable library or objective, ToolError when Yosys fails
    or runs out of time, BitwrightError naming a cell that could not be mapped.
    """
    if objective not in ("area_delay", "area", "delay"):
        raise InputError(f"Objective {objective!r} is none of area_delay, area, delay.")
    inputs = {
        "source": source.encode(), "top": top, "library": library.digest, "objective": objective,
        "boxes": sorted(boxes), "recipe": _RECIPE_VERSION, "scripts": SCRIPTS, "yosys": yosys_version(),
    }  # fmt: skip
    if within_s is not None:
        inputs["all_paths_within_ps"] = round(within_s * 1e12)

    def compute() -> dict[str, Any]:
        return _synthesise(source, top, library, objective, tuple(boxes), parallel, timeout_s, within_s).to_json()

    return GateReport.from_json(cache.get_or_compute("synthesis", inputs, compute))


@dataclass(frozen=True)
class _Mapped:
    candidate: Candidate
    text: str
    netlist: Netlist
    timing: TimingReport


def _synthesise(
    source: str, top: str, library: Library, objective: Objective, boxes: tuple[str, ...], parallel: int | None,
    timeout_s: float, within_s: float | None,
) -> GateReport:  # fmt: skip
    cells = library.mapping_text
    parallel = parallel or min(4, len(os.sched_getaffinity(0)))
    with progress(f"Synthesising {top} for {library.name}", len(SCRIPTS) + 1) as done:
        rtlil = source.lstrip().startswith(("attribute", "module \\", "autoidx", "#"))
        reads = "read_rtlil design.il\n" if rtlil else "read_verilog -sv design.v\n"
        black = "".join(f"blackbox {name}\n" for name in boxes)
        files = {"design.il": source, "design.v": source, "cells.lib": cells}
        prepared = run_yosys(reads + black + _PREPARE.format(top=top), files, ["prepared.il"], timeout_s)["prepared.il"]
        done(1)

        def attempt(choices: list[tuple[str, int]]) -> list[_Mapped]:
            found = []
            for at in range(0, len(choices), parallel):
                some = choices[at : at + parallel]
                jobs = [_mapping_job(prepared, cells, library, script, target) for script, target in some]
                texts = run_yosys_jobs(jobs, parallel, timeout_s)
                found += [_mapped(text["mapped.json"], top, library, boxes, *choice)
                          for text, choice in zip(texts, some, strict=True)]  # fmt: skip
                done(len(some))
            return found

        results = attempt([(name, _TARGET_PS) for name in SCRIPTS])
    fitting = [mapped for mapped in results if within_s is not None and _longest(mapped) <= within_s]
    if fitting:
        best = min(fitting, key=lambda mapped: _cost(mapped, "area"))
    elif within_s is not None:
        best = min(results, key=_longest)
    else:
        best = min(results, key=lambda mapped: _cost(mapped, objective))
    flops = {group.cell for group in best.netlist.flip_flops}
    areas = {cell: count * library.cell(cell).area_um2 for cell, count in best.netlist.cells.items()}
    leakage = sum(count * library.cell(cell).leakage_w for cell, count in best.netlist.cells.items())
    return GateReport(
        top, library.name, library.digest, yosys_version(), objective,
        f"abc {best.candidate.script}, target {best.candidate.target_ps} ps", sum(areas.values()),
        sum(area for cell, area in areas.items() if cell in flops), leakage, best.candidate.period_s,
        min((mapped.candidate.period_s for mapped in results if mapped.candidate.period_s is not None), default=None),
        _period(best), best.netlist.cells, tuple(mapped.candidate for mapped in results), boxes, best.text,
    )  # fmt: skip


def _period(mapped: _Mapped) -> float:
    """The clock period, or the longest path of a module without register-to-register paths."""
    timing = mapped.timing
    paths = (timing.input_to_register_s, timing.register_to_output_s, timing.input_to_output_s)
    return timing.register_to_register_s or max(path for path in paths if path is not None)


def _longest(mapped: _Mapped) -> float:
    timing = mapped.timing
    paths = (
        timing.register_to_register_s, timing.input_to_register_s, timing.register_to_output_s,
        timing.input_to_output_s,
    )  # fmt: skip
    return max((path for path in paths if path is not None), default=0.0)


def _cost(mapped: _Mapped, objective: Objective) -> tuple[float, float]:
    area, period = mapped.candidate.area_um2, _period(mapped)
    first = {"area_delay": area * period, "area": area, "delay": period}[objective]
    return first, area * period


def _mapping_job(prepared: str, cells: str, library: Library, script: str, target_ps: int) -> YosysJob:
    load_pf = 2e12 * library.unit_load_f
    constraints = f"set_driving_cell {library.driver}\nset_load {load_pf:.6g} [all_outputs]\n"
    commands = "read_rtlil prepared.il\n"
    commands += f"abc -liberty cells.lib -constr constraints -D {target_ps} -script abc.script\n"
    commands += "opt_clean -purge\nsetattr -unset src */w:* */c:* *\nwrite_json mapped.json\n"
    text = SCRIPTS[script] + "\n"
    files = {"prepared.il": prepared, "cells.lib": cells, "constraints": constraints, "abc.script": text}
    return YosysJob(commands, files, ["mapped.json"])


def _mapped(text: str, top: str, library: Library, boxes: tuple[str, ...], script: str, target_ps: int) -> _Mapped:
    module = json.loads(text)["modules"][top]
    kept = {name: module[name] for name in ("ports", "cells")}
    for cell in kept["cells"].values():
        for name in ("hide_name", "attributes", "parameters", "port_directions"):
            cell.pop(name, None)
    compact = json.dumps({"modules": {top: kept}}, separators=(",", ":"))
    netlist = read_netlist(compact, top, library, boxes)
    timing = analyse_timing(netlist)
    area = sum(count * library.cell(cell).area_um2 for cell, count in netlist.cells.items())
    return _Mapped(Candidate(script, target_ps, area, timing.register_to_register_s), compact, netlist, timing)


@dataclass(frozen=True)
class ArrayReport:
    """An array mapped module by module: `parts` by name with their number of instances, `glue` around them.

    `period_s` is the static timing of the whole joined netlist.
    """

    glue: GateReport
    parts: Mapping[str, GateReport]
    instances: Mapping[str, int]
    period_s: float

    @property
    def area_um2(self) -> float:
        """Cell area of all instances and of the cells around them."""
        return self.glue.area_um2 + sum(self.instances[name] * part.area_um2 for name, part in self.parts.items())

    @property
    def leakage_w(self) -> float:
        """Leakage power of all instances and of the cells around them."""
        return self.glue.leakage_w + sum(self.instances[name] * part.leakage_w for name, part in self.parts.items())

    def netlist(self, library: Library) -> Netlist:
        """The whole array as one netlist of cells."""
        return join(self.glue.netlist(library), {name: part.netlist(library) for name, part in self.parts.items()})


def synthesise_array(
    source: str,
    top: str,
    library: Library,
    parts: Sequence[str] = ("pe", "output_stage"),
    objective: Objective = "area_delay",
) -> ArrayReport:
    """Synthesise each module of `parts` once and the rest of `top` around them as boxes, so size costs little.

    The first part is mapped for the objective; for "area_delay" the others, which are few, are as small as its period
    allows, a fifth of it left for the register before them.

    `source` is Verilog whose parts instantiate no other module. Each is mapped from its own text alone: Yosys numbers
    cells over the whole input and ABC's result follows the numbers, so that the same element would otherwise come out
    some percent different in every array, and could not be shared between them in the cache.

    Raises as `synthesise`, and InputError when a part is not a module of `source` or not used in `top`.
    """
    modules = {match.group(1): match.group() for match in _MODULE.finditer(source)}
    for part in parts:
        if part not in modules:
            raise InputError(f"The source has no module {part!r}; it has {', '.join(modules) or 'none'}.")
    first = parts[0]
    reports = {first: synthesise(modules[first] + "\n", first, library, objective)}
    period = reports[first].period_s
    within = _SLACK * period if period and objective == "area_delay" else None
    for part in parts[1:]:
        reports[part] = synthesise(modules[part] + "\n", part, library, objective, within_s=within)
    glue = synthesise(source, top, library, objective, boxes=parts, within_s=within)
    outer = glue.netlist(library)
    instances = {part: sum(box.module == part for box in outer.boxes) for part in parts}
    for part, count in instances.items():
        if not count:
            raise InputError(f"Module {top!r} has no instance of {part!r}.")
    whole = join(outer, {part: report.netlist(library) for part, report in reports.items()})
    return ArrayReport(glue, reports, instances, analyse_timing(whole).period_s)
