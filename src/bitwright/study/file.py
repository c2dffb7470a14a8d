"""Study files: what to evaluate, read from YAML, every key and unit checked."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Strict,
    ValidationError,
    model_validator,
)

from bitwright.core.errors import InputError
from bitwright.core.quantity import parse_quantity


def _in_unit(unit: str) -> BeforeValidator:
    def parse(value: Any) -> float:
        try:
            return parse_quantity(value, unit)
        except InputError as error:
            raise ValueError(str(error)) from None

    return BeforeValidator(parse)


def _positive(value: float) -> float:
    if value <= 0:
        raise ValueError("must be greater than zero")
    return value


def _distinct(names: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(names)) != len(names):
        raise ValueError(f"a name is given twice: {', '.join(names)}")
    return names


_SMALLEST_BUFFER = 8192  # the timeline of a smaller one has millions of pieces


def _holds_tiles(value: float) -> float:
    if value < _SMALLEST_BUFFER:
        raise ValueError(f"must be at least {_SMALLEST_BUFFER / 1024:g} KiB")
    return value


# Whole numbers only: YAML's `true` and 2.0 are mistakes here.
Whole = Annotated[int, Strict()]
Bytes = Annotated[float, _in_unit("B"), AfterValidator(_positive)]
JoulesPerByte = Annotated[float, _in_unit("J/B"), AfterValidator(_positive)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSection(_Section):
    """The network, the formats it is executed in, and the text its perplexity is measured on."""

    name: str
    formats: Annotated[tuple[Literal["fp32", "int8"], ...], AfterValidator(_distinct)] = ("fp32", "int8")
    text: str = "default"
    window: Whole = Field(512, ge=16)
    tokens: Whole = Field(2048, ge=16)


class WorkloadSection(_Section):
    """The phases that are mapped: a prompt of `prompt` tokens; one decode step after `context` cached tokens."""

    batch: Whole = Field(1, ge=1)
    prompt: Whole = Field(512, ge=1)
    context: Whole = Field(512, ge=1)


class EngineSection(_Section):
    """One systolic array. `processing_element` names how it accumulates; operands are the model's INT8 values."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_-]*$")
    processing_element: Literal["multiply-accumulate", "compressed-accumulation"]
    rows: Whole = Field(16, ge=1, le=256)
    columns: Whole = Field(16, ge=1, le=256)
    operand_bits: Whole = Field(8, ge=8, le=16)
    accumulator_bits: Whole = Field(32, ge=16, le=64)


class BufferSection(_Section):
    """On-chip operand buffer: it is not synthesised, so its energy is somebody's published figure."""

    capacity: Annotated[Bytes, AfterValidator(_holds_tiles)]
    energy: JoulesPerByte
    source: str = Field(min_length=1)


class Study(_Section):
    """A whole study file."""

    title: str
    model: ModelSection
    workload: WorkloadSection = Field(default_factory=lambda: WorkloadSection.model_validate({}))
    engines: tuple[EngineSection, ...] = Field(min_length=1)
    libraries: Annotated[tuple[str, ...], AfterValidator(_distinct)] = Field(("predictive-28nm",), min_length=1)
    objective: Literal["area_delay", "area", "delay"] = "area_delay"
    buffer: BufferSection
    vector_lanes: Whole = Field(64, ge=1)
    memory: str
    seed: Whole = Field(0, ge=0)

    @model_validator(mode="after")
    def _distinct_names(self) -> Study:
        names = [engine.name for engine in self.engines]
        if len(set(names)) != len(names):
            raise ValueError(f"two engines have the same name: {', '.join(names)}")
        return self


class _UniqueKeys(yaml.SafeLoader):
    """YAML lets a key appear twice and takes the last; in a study that is a mistake."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.MarkedYAMLError(
                        "", node.start_mark, f"the key {key.value!r} appears twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def load_study(path: Path) -> Study:
    """Read and check a study file.

    Raises InputError for an unreadable file, malformed YAML, an unknown key, a wrong unit or an impossible extent;
    the message names the file and the place in it.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"Cannot read the study file {path}: {getattr(error, 'strerror', None) or error}.") from None
    try:
        data = yaml.load(text, _UniqueKeys)
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not valid YAML: {_explain_yaml(error)}") from None
    if not isinstance(data, dict):
        raise InputError(f"{path} must hold a mapping of keys such as 'title', 'model' and 'engines'.")
    return parse_study(data, str(path))


def parse_study(data: dict[str, Any], origin: str = "study") -> Study:
    """Check the contents of a study file; `origin` names it in errors."""
    try:
        return Study.model_validate(data)
    except ValidationError as error:
        problems = []
        places = [problem["loc"] for problem in error.errors()]
        for problem in error.errors():
            depth = len(problem["loc"])
            if any(len(other) > depth and other[:depth] == problem["loc"] for other in places):
                continue  # the list it is in counts as missing then; what is wrong inside says more
            place = ".".join(str(part) for part in problem["loc"]) or "the file"
            message = _plain(problem["msg"])
            if problem["type"] not in ("missing", "value_error"):
                message += f", given {problem['input']!r:.60}"
            if problem["type"] == "extra_forbidden":
                message = f"unknown key; known here: {', '.join(_known_keys(problem['loc']))}"
            problems.append(f"{place}: {message}")
        raise InputError(f"{origin}: " + "; ".join(problems)) from None


def _plain(message: str) -> str:
    """Pydantic's message in the words of a YAML file."""
    message = message.removeprefix("Value error, ").removeprefix("Input ")
    message = re.sub(r"valid dictionary or instance of \w+", "mapping of keys", message)
    message = re.sub(r"Tuple should have at least (\d+) item.*", r"should have at least \1 entry", message)
    return message.replace("Field required", "is missing").replace("valid tuple", "list")


def _explain_yaml(error: yaml.YAMLError) -> str:
    """One line: what is wrong, and where."""
    mark = getattr(error, "problem_mark", None)
    where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    return where + str(getattr(error, "problem", None) or error).replace("\n", " ")


def _known_keys(location: tuple[int | str, ...]) -> list[str]:
    sections: dict[str, type[BaseModel]] = {
        "model": ModelSection, "workload": WorkloadSection, "engines": EngineSection, "buffer": BufferSection,
    }  # fmt: skip
    section = sections.get(str(location[0]), Study) if len(location) > 1 else Study
    return sorted(section.model_fields)
