"""Machines: devices, memories, links, clusters and spatial accelerators, read from YAML with units and sources.

A machine file gives every figure with its unit and where it comes from, in one of two forms:

    bandwidth: {value: "2.0 TB/s", source: "A100 datasheet", evidence: published}
    bandwidth: "2.0 TB/s"            # with a source for its key path, or for a path above it, in `sources:`

    sources:
      devices.gpu: "A100 datasheet, NVIDIA, 2021"          # covers every figure of the device ...
      devices.gpu.launch_overhead: {source: "assumption: ...", evidence: predicted}      # ... but this one

The longest matching path wins. A figure without a source, a wrong unit, a negative or missing figure and an unknown key
are refused with the file, the key path and what was expected. `preset: NAME` inside a device, a link or a node takes it
from another machine. Inside, figures are `Quantity` objects in SI base units.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import platformdirs
from pydantic import BaseModel, ValidationError

from bitwright.core.errors import InputError, UnknownNameError
from bitwright.core.machine_schema import (
    Accelerator,
    ArrayDimension,
    ArrayMemory,
    Compute,
    Device,
    Link,
    Machine,
    Memory,
    MemoryPreset,
    Tile,
    read_evidence,
)
from bitwright.core.quantity import Evidence, Quantity, format_value
from bitwright.core.yaml_text import parse_yaml

__all__ = [
    "THIS_MACHINE",
    "Accelerator",
    "ArrayDimension",
    "ArrayMemory",
    "Compute",
    "Device",
    "Link",
    "Machine",
    "Memory",
    "MemoryPreset",
    "Tile",
    "list_machines",
    "load_machine",
    "machine_from_data",
    "memory_preset",
    "memory_presets",
    "this_machine_path",
]

THIS_MACHINE = "this-machine"

Sources = Mapping[str, tuple[str, Evidence]]


def _read_sources(given: Any, where: str) -> Sources:
    if not isinstance(given, Mapping):
        raise InputError(f"{where}: `sources` must map key paths to sources, given {given!r}.")
    sources = {}
    for path, entry in given.items():
        text, evidence = entry, Evidence.PUBLISHED
        if isinstance(entry, Mapping):
            if set(entry) - {"source", "evidence"}:
                raise InputError(f"{where}: sources.{path}: expected {{source, evidence}}, given {dict(entry)!r}.")
            text = entry.get("source")
            try:
                evidence = read_evidence(entry.get("evidence", Evidence.PUBLISHED))
            except ValueError as error:
                raise InputError(f"{where}: sources.{path}: {error}.") from None
        if not isinstance(text, str) or not text.strip():
            raise InputError(f"{where}: sources.{path}: the source is empty; say where the figures come from.")
        sources[str(path)] = (text.strip(), evidence)
    return sources


def _with_sources(value: Any, path: str, sources: Sources, where: str, used: set[str]) -> Any:
    """`value` with the source of every compact figure filled in from `sources` by the longest matching key path."""
    if isinstance(value, Quantity):
        if value.source:
            return value
        parts = path.split(".")
        for length in range(len(parts), 0, -1):
            prefix = ".".join(parts[:length])
            if prefix in sources:
                used.add(prefix)
                source, evidence = sources[prefix]
                return Quantity(value.value, value.unit, evidence, source)
        raise InputError(
            f"{where}: {path}: the figure {format_value(value.value, value.unit)!r} has no source. "
            f"Write {{value: ..., source: ...}}, or add {path!r} (or a path above it) to `sources`."
        )
    if isinstance(value, BaseModel):
        names = [name for name in type(value).model_fields if name in value.model_fields_set]
        return value.model_copy(update={
            name: _with_sources(getattr(value, name), f"{path}.{name}" if path else name, sources, where, used)
            for name in names
        })  # fmt: skip
    if isinstance(value, dict):
        return {name: _with_sources(item, f"{path}.{name}", sources, where, used) for name, item in value.items()}
    return value


def _explain(error: ValidationError, where: str) -> InputError:
    lines = []
    for item in error.errors(include_url=False)[:3]:
        path = ".".join(str(part) for part in item["loc"]) or "the machine"
        kind = item["type"]
        if kind == "extra_forbidden":
            reason = "unknown key"
        elif kind == "missing":
            reason = "missing"
        else:
            reason = str(item["msg"]).removeprefix("Value error, ")
        lines.append(f"{path}: {reason}")
    more = error.error_count() - len(lines)
    return InputError(f"{where}: {'; '.join(lines)}{f'; and {more} more' if more > 0 else ''}.")


def _merged(value: BaseModel, raw: Mapping[str, Any], where: str, path: str) -> BaseModel:
    """A model taken from a preset, with the keys written beside `preset` replaced."""
    extra = {name: item for name, item in raw.items() if name != "preset"}
    fields = {name: getattr(value, name) for name in value.model_fields_set}
    try:
        return type(value).model_validate({**fields, **extra})
    except ValidationError as error:
        raise _explain(error, f"{where}: {path}") from None


def _expand(data: dict[str, Any], where: str, open_presets: tuple[str, ...]) -> dict[str, Any]:
    """Replace `preset: NAME` of the machine, its devices and its links by the models of that machine."""

    def other(name: Any) -> Machine:
        if str(name) in open_presets:
            raise InputError(f"{where}: preset {name!r} leads back to itself.")
        return _load(str(name), open_presets)

    if "preset" in data:
        base = other(data["preset"])
        kept = {name: getattr(base, name) for name in base.model_fields_set if name != "name"}
        data = {**kept, **{name: item for name, item in data.items() if name != "preset"}}
    for section in ("devices", "links"):
        entries = data.get(section)
        if not isinstance(entries, Mapping):
            continue
        expanded = dict(entries)
        for name, raw in entries.items():
            if isinstance(raw, Mapping) and "preset" in raw:
                path = f"{section}.{name}"
                models: Mapping[str, BaseModel] = getattr(other(raw["preset"]), section)
                found = models.get(name) or next(iter(models.values()), None)
                if found is None:
                    raise InputError(f"{where}: {path}: machine {raw['preset']!r} has no {section}.")
                expanded[name] = _merged(found, raw, where, path)
        data = {**data, section: expanded}
    return data


def machine_from_data(data: Any, where: str, open_presets: tuple[str, ...] = ()) -> Machine:
    """Build a machine from the parsed contents of a machine file; `where` names it in errors.

    Raises InputError naming the key path and what was expected.
    """
    if not isinstance(data, Mapping):
        raise InputError(f"{where}: expected a mapping with `name`, `devices`, ..., given {type(data).__name__}.")
    raw = dict(data)
    sources = _read_sources(raw.pop("sources", {}), where)
    raw = _expand(raw, where, open_presets)
    try:
        machine = Machine.model_validate(raw)
    except ValidationError as error:
        raise _explain(error, where) from None
    used: set[str] = set()
    sourced: Machine = _with_sources(machine, "", sources, where, used)
    unused = set(sources) - used
    if unused:
        raise InputError(f"{where}: sources.{min(unused)}: no figure takes this source; is the key path right?")
    return sourced


def _parse(text: str, where: str) -> Any:
    if not where.endswith(".json"):
        return parse_yaml(text, where)
    try:
        return json.loads(text)
    except ValueError as error:
        raise InputError(f"{where} is not valid JSON: {error}.") from None


def this_machine_path() -> Path:
    """Where `bitwright machine measure` keeps the description of this computer."""
    folder = os.environ.get("BITWRIGHT_DATA") or platformdirs.user_data_dir("bitwright")
    return Path(folder) / "machines" / f"{THIS_MACHINE}.yaml"


def _preset_folder() -> Any:
    return resources.files("bitwright") / "machines"


def list_machines() -> list[str]:
    """Names of the machines that come with Bitwright, and "this-machine"."""
    names = {entry.name.removesuffix(".yaml") for entry in _preset_folder().iterdir() if entry.name.endswith(".yaml")}
    return sorted(names - {"memories"} | {THIS_MACHINE})


@cache
def _load_preset(name: str, open_presets: tuple[str, ...]) -> Machine:
    where = f"machines/{name}.yaml"
    return machine_from_data(_parse((_preset_folder() / f"{name}.yaml").read_text(), where), where, open_presets)


def _load(name: str, open_presets: tuple[str, ...]) -> Machine:
    path = Path(name)
    if path.suffix in (".yaml", ".yml", ".json") or path.is_file():
        try:
            text = path.read_text()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not a text file"
            raise InputError(f"Cannot read the machine file {path}: {reason}.") from None
        return machine_from_data(_parse(text, str(path)), str(path), (*open_presets, name))
    if name == THIS_MACHINE:
        measured = this_machine_path()
        if not measured.is_file():
            raise InputError("This machine has not been measured yet; run: bitwright machine measure")
        return machine_from_data(_parse(measured.read_text(), str(measured)), str(measured))
    if name not in list_machines():
        raise UnknownNameError("machine", name, list_machines())
    return _load_preset(name, (*open_presets, name))


def load_machine(name_or_path: str | Path) -> Machine:
    """A machine by the name of a preset, by the path of a machine file (.yaml, .json), or "this-machine".

    Raises InputError for an unreadable file and for anything wrong in it, UnknownNameError for an unknown name.
    """
    return _load(str(name_or_path), ())


@cache
def memory_presets() -> Mapping[str, MemoryPreset]:
    """The DRAM presets by name, from `machines/memories.yaml`."""
    where = "machines/memories.yaml"
    raw = dict(_parse((_preset_folder() / "memories.yaml").read_text(), where))
    sources = _read_sources(raw.pop("sources", {}), where)
    presets = {}
    for name, entry in raw.items():
        try:
            preset = MemoryPreset.model_validate(entry)
        except ValidationError as error:
            raise _explain(error, f"{where}: {name}") from None
        presets[name] = _with_sources(preset, name, sources, where, set())
    return presets


def memory_preset(name: str) -> MemoryPreset:
    """A DRAM preset by name. Raises UnknownNameError with the known names."""
    if name not in memory_presets():
        raise UnknownNameError("memory", name, memory_presets())
    return memory_presets()[name]
