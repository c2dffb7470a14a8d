"""Study files: what to evaluate, read from YAML, every key and unit checked."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
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


Bytes = Annotated[float, _in_unit("B"), AfterValidator(_positive)]
JoulesPerByte = Annotated[float, _in_unit("J/B"), AfterValidator(_positive)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSection(_Section):
    """The network, the formats it is executed in, and the text its perplexity is measured on."""

    name: str
    formats: tuple[Literal["fp32", "int8"], ...] = ("fp32", "int8")
    text: str = "default"
    window: int = Field(512, ge=16)
    tokens: int = Field(2048, ge=16)


class WorkloadSection(_Section):
    """The phases that are mapped: a prompt of `prompt` tokens; one decode step after `context` cached tokens."""

    batch: int = Field(1, ge=1)
    prompt: int = Field(512, ge=1)
    context: int = Field(512, ge=1)


class EngineSection(_Section):
    """One systolic array. `processing_element` names how it accumulates."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_-]*$")
    processing_element: Literal["multiply-accumulate", "compressed-accumulation"]
    rows: int = Field(16, ge=1, le=256)
    columns: int = Field(16, ge=1, le=256)
    operand_bits: int = Field(8, ge=2, le=16)
    accumulator_bits: int = Field(32, ge=8, le=64)


class BufferSection(_Section):
    """On-chip operand buffer: it is not synthesised, so its energy is somebody's published figure."""

    capacity: Bytes
    energy: JoulesPerByte
    source: str = Field(min_length=1)


class Study(_Section):
    """A whole study file."""

    title: str
    model: ModelSection
    workload: WorkloadSection = Field(default_factory=lambda: WorkloadSection.model_validate({}))
    engines: tuple[EngineSection, ...] = Field(min_length=1)
    libraries: tuple[str, ...] = ("predictive-28nm",)
    objective: Literal["area_delay", "area", "delay"] = "area_delay"
    buffer: BufferSection
    vector_lanes: int = Field(64, ge=1)
    memory: str
    seed: int = 0

    @model_validator(mode="after")
    def _distinct_names(self) -> Study:
        names = [engine.name for engine in self.engines]
        if len(set(names)) != len(names):
            raise ValueError(f"engines: two engines have the same name: {', '.join(names)}")
        return self


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
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(data, dict):
        raise InputError(f"{path} must hold a mapping of keys such as 'title', 'model' and 'engines'.")
    return parse_study(data, str(path))


def parse_study(data: dict[str, Any], origin: str = "study") -> Study:
    """Check the contents of a study file; `origin` names it in errors."""
    try:
        return Study.model_validate(data)
    except ValidationError as error:
        problems = []
        for problem in error.errors():
            place = ".".join(str(part) for part in problem["loc"]) or "the file"
            message = problem["msg"].removeprefix("Value error, ")
            if problem["type"] == "extra_forbidden":
                message = f"unknown key; known here: {', '.join(_known_keys(problem['loc']))}"
            problems.append(f"{place}: {message}")
        raise InputError(f"{origin}: " + "; ".join(problems)) from None


def _known_keys(location: tuple[int | str, ...]) -> list[str]:
    sections: dict[str, type[BaseModel]] = {
        "model": ModelSection, "workload": WorkloadSection, "engines": EngineSection, "buffer": BufferSection,
    }  # fmt: skip
    section = sections.get(str(location[0]), Study) if len(location) > 1 else Study
    return sorted(section.model_fields)
