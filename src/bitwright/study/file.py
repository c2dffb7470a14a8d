"""Study files: what to evaluate, read from YAML, every key and unit checked."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

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
from bitwright.core.yaml_text import parse_yaml
from bitwright.engine.tensor_engine import TensorEngine


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
    """One tensor engine: a baseline `dataflow`, changed by `transformations`, on the model's INT8 values.

    `operand_bits` is the width of both operands, `a_bits` and `b_bits` change one of them. Without `rows` and `depth`,
    the shape is that of `engine_shape`.
    """

    name: str = Field(pattern=r"^[a-z][a-z0-9_-]*$")
    dataflow: Literal["os", "ws", "cube", "tree", "matrix2d"] = "os"
    rows: Whole | None = Field(None, ge=1, le=256)
    columns: Whole = Field(16, ge=1, le=256)
    depth: Whole | None = Field(None, ge=1, le=256)
    transformations: tuple[str, ...] = ()
    encoding: str = "mbe"
    multiplier: Literal["booth", "tool"] = "booth"  # a study runs INT8 models; other formats are in format tables
    operand_bits: Whole = Field(8, ge=8, le=16)
    a_bits: Whole | None = Field(None, ge=8, le=16)
    b_bits: Whole | None = Field(None, ge=8, le=16)
    accumulator_bits: Whole = Field(32, ge=16, le=64)

    @model_validator(mode="before")
    @classmethod
    def _explain_keys(cls, data: Any) -> Any:
        if isinstance(data, dict) and "nest" in data:
            raise ValueError(
                "an engine is a `dataflow` and `transformations` of it, not a nest of its own; "
                "`bitwright engine transform` shows what transformations make of a nest"
            )
        if isinstance(data, dict) and "processing_element" in data:
            raise ValueError(
                "`processing_element` is written as `transformations` now: none for multiply-accumulate, "
                "`[opt1]` for compressed accumulation"
            )
        return data


def engine_shape(dataflow: str, rows: int | None, depth: int | None) -> tuple[int, int]:
    """Rows and depth of an engine, those not given set so that 16 columns make 256 multiply-accumulates: 16 rows, one
    row x a depth of 16 (ws, tree), or 4 x 4 (cube)."""
    defaults = {"ws": (1, 16), "tree": (1, 16), "cube": (4, 4)}.get(dataflow, (16, 1))
    return defaults[0] if rows is None else rows, defaults[1] if depth is None else depth


def describe_engine(section: EngineSection) -> TensorEngine:
    """The engine a study describes. Raises as `TensorEngine`; its nest is made, and checked, when first used."""
    rows, depth = engine_shape(section.dataflow, section.rows, section.depth)
    return TensorEngine(
        rows=rows,
        columns=section.columns,
        transformations=section.transformations,
        dataflow=section.dataflow,
        depth=depth,
        a_bits=section.a_bits or section.operand_bits,
        b_bits=section.b_bits or section.operand_bits,
        accumulator_bits=section.accumulator_bits,
        encoding=section.encoding,
        multiplier=section.multiplier,
    )


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


def load_study(path: Path) -> Study:
    """Read and check a study file.

    Raises InputError for an unreadable file, malformed YAML, an unknown key, a wrong unit or an impossible extent;
    the message names the file and the place in it.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"Cannot read the study file {path}: {getattr(error, 'strerror', None) or error}.") from None
    data = parse_yaml(text, str(path))
    if not isinstance(data, dict):
        raise InputError(f"{path} must hold a mapping of keys such as 'title', 'model' and 'engines'.")
    return parse_study(data, str(path))


def parse_study(data: dict[str, Any], origin: str = "study") -> Study:
    """Check the contents of a study file; `origin` names it in errors.

    An engine whose transformations are illegal raises InputError with the rule and the nest before the failing step.
    """
    try:
        study = Study.model_validate(data)
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
    for section in study.engines:
        try:
            _ = describe_engine(section).nest
        except InputError as error:
            raise InputError(f"{origin}, engine {section.name!r}: {error}") from None
    return study


def _plain(message: str) -> str:
    """Pydantic's message in the words of a YAML file."""
    message = message.removeprefix("Value error, ").removeprefix("Input ")
    message = re.sub(r"valid dictionary or instance of \w+", "mapping of keys", message)
    message = re.sub(r"Tuple should have at least (\d+) item.*", r"should have at least \1 entry", message)
    return message.replace("Field required", "is missing").replace("valid tuple", "list")


def _known_keys(location: tuple[int | str, ...]) -> list[str]:
    sections: dict[str, type[BaseModel]] = {
        "model": ModelSection, "workload": WorkloadSection, "engines": EngineSection, "buffer": BufferSection,
    }  # fmt: skip
    section = sections.get(str(location[0]), Study) if len(location) > 1 else Study
    return sorted(section.model_fields)
