"""Study files: what to evaluate, read from YAML, every key and unit checked."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

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

from bitwright.arithmetic import formats as number_formats
from bitwright.core.errors import InputError
from bitwright.core.quantity import parse_quantity
from bitwright.core.yaml_text import parse_yaml
from bitwright.engine.format_products import ProductUnit, product_name, product_unit
from bitwright.engine.tensor_engine import TensorEngine

if TYPE_CHECKING:
    from bitwright.models.format_execution import FormatAssignment


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


_OPERANDS = ("weights", "activations", "keys", "values", "attention")
_MEET = (("activations", "weights"), ("attention", "keys"), ("attention", "values"))  # on the array
_BUILT_IN = ("fp32", "int8")  # as the model is, and `models.integer`


class FormatSection(_Section):
    """The number formats a model is executed in, operand by operand, as `models.format_execution.FormatAssignment`.

    In a study file a bare name stands for all operands in that format; "fp32" is the model as it is, "int8" integer
    execution with a scale per channel and token.
    """

    name: str = Field(min_length=1)
    weights: str | None = None
    activations: str | None = None
    keys: str | None = None
    values: str | None = None
    attention: str | None = None
    accumulation: str = "fp32"

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, data: Any) -> Any:
        if not isinstance(data, str):
            return data
        try:
            return {"name": data} | (
                {} if data in _BUILT_IN else dict.fromkeys(_OPERANDS, number_formats.parse(data).name)
            )
        except InputError as error:
            raise ValueError(f"{error} fp32 and int8 are known as well.") from None

    @model_validator(mode="after")
    def _check(self) -> FormatSection:
        if self.built_in:
            if self.model_fields_set - {"name"}:
                raise ValueError(f"the name {self.name} is taken; give operands with formats of their own another one")
        else:
            try:
                _ = self.assignment
            except InputError as error:
                raise ValueError(str(error)) from None
        return self

    @property
    def built_in(self) -> bool:
        """Whether it is fp32 or int8, which need no formats."""
        return self.name in _BUILT_IN

    @property
    def assignment(self) -> FormatAssignment:
        """What `execute_in` takes. Raises InputError as it does."""
        from bitwright.models.format_execution import FormatAssignment

        return FormatAssignment(**self.model_dump(exclude={"name"}))


def _distinct_formats(entries: tuple[FormatSection, ...]) -> tuple[FormatSection, ...]:
    _distinct(tuple(entry.name for entry in entries))
    return entries


class ModelSection(_Section):
    """The network, the formats it is executed in, and the text its perplexity is measured on."""

    name: str
    formats: Annotated[tuple[FormatSection, ...], AfterValidator(_distinct_formats)] = (
        FormatSection(name="fp32"), FormatSection(name="int8"),
    )  # fmt: skip
    text: str = "default"
    window: Whole = Field(512, ge=16)
    tokens: Whole = Field(2048, ge=16)

    def format(self, name: str) -> FormatSection:
        """The format of that name; "int8" needs no mention. Raises InputError for others."""
        known = {entry.name: entry for entry in (FormatSection(name="int8"), *self.formats)}
        if name not in known:
            raise InputError(f"formats {name!r} are not among model.formats: {', '.join(known)}.")
        return known[name]


class WorkloadSection(_Section):
    """The phases that are mapped: a prompt of `prompt` tokens; one decode step after `context` cached tokens."""

    batch: Whole = Field(1, ge=1)
    prompt: Whole = Field(512, ge=1)
    context: Whole = Field(512, ge=1)


class EngineSection(_Section):
    """One tensor engine: a baseline `dataflow`, changed by `transformations`, on the model's values in `formats`.

    `formats` names an entry of `model.formats`. The multiplier of other formats than int8 is the product of their codes
    unless it is said to be one of integers. `operand_bits` is the width of both operands of an integer multiplier,
    `a_bits` and `b_bits` change one of them. Without `rows` and `depth`, the shape is that of `engine_shape`; without
    `accumulator_bits`, sums are 32 bits wide, or as wide as 2048 products of the codes need.
    """

    name: str = Field(pattern=r"^[a-z][a-z0-9_-]*$")
    dataflow: Literal["os", "ws", "cube", "tree", "matrix2d"] = "os"
    rows: Whole | None = Field(None, ge=1, le=256)
    columns: Whole = Field(16, ge=1, le=256)
    depth: Whole | None = Field(None, ge=1, le=256)
    transformations: tuple[str, ...] = ()
    formats: str = "int8"
    encoding: str = "mbe"
    multiplier: Literal["booth", "tool"] | None = None
    operand_bits: Whole = Field(8, ge=8, le=16)
    a_bits: Whole | None = Field(None, ge=8, le=16)
    b_bits: Whole | None = Field(None, ge=8, le=16)
    accumulator_bits: Whole | None = Field(None, ge=16, le=64)

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


_INTEGER_SUM_BITS = 32
_LONGEST_SUM = 2048  # products, of a sum whose width the study does not give


def describe_engine(section: EngineSection, model: ModelSection) -> TensorEngine:
    """The engine a study describes, for the codes that the model's formats have.

    Raises InputError for formats whose codes have no product or not one for all of them, and as `TensorEngine`; its
    nest is made, and checked, when first used.
    """
    rows, depth = engine_shape(section.dataflow, section.rows, section.depth)
    formats = model.format(section.formats)
    multiplier: str = section.multiplier or "booth"
    accumulator_bits = section.accumulator_bits or _INTEGER_SUM_BITS
    widths = section.a_bits or section.operand_bits, section.b_bits or section.operand_bits
    if formats.name != "int8":
        units = _products(formats)
        least = sum(widths)
        if section.multiplier is None:
            multiplier, least = _one_product(section, formats, units), max(unit.product_bits for unit in units.values())
        for pair, unit in units.items():
            integers = unit.a.name.startswith("int") and unit.b.name.startswith("int")
            if section.multiplier and not (integers and unit.a_bits <= widths[0] and unit.b_bits <= widths[1]):
                raise InputError(
                    f"`multiplier: {multiplier}` multiplies integers of {widths[0]} x {widths[1]} bits; {pair} are "
                    f"{unit.name} codes."
                )
        accumulator_bits = section.accumulator_bits or max(least, sum_bits(formats, _LONGEST_SUM), 16)
    return TensorEngine(
        rows=rows,
        columns=section.columns,
        transformations=section.transformations,
        dataflow=section.dataflow,
        depth=depth,
        a_bits=widths[0],
        b_bits=widths[1],
        accumulator_bits=accumulator_bits,
        encoding=section.encoding,
        multiplier=multiplier,
    )


def sum_bits(formats: FormatSection, k: int) -> int:
    """Bits of sums over `k` products of the codes. Raises InputError as `describe_engine`."""
    if formats.name == "int8":  # codes of -127 to 127
        return (k * 127 * 127).bit_length() + 1
    return max(unit.sum_bits(k) for unit in _products(formats).values())


def _products(formats: FormatSection) -> dict[str, ProductUnit]:
    """The exact products of codes that meet on the array, by what meets: activations and weights, queries and keys,
    probabilities and values."""
    missing = [role for role in _OPERANDS if getattr(formats, role) is None]
    if missing:
        raise InputError(
            f"formats {formats.name!r} leave {', '.join(missing)} in floating point, which the engine has no product "
            "for; give them a format too."
        )
    kinds = {role: number_formats.parse(getattr(formats, role)).operand for role in _OPERANDS}
    units = {}
    for left, right in _MEET:
        pair = f"{left} {getattr(formats, left)} x {right} {getattr(formats, right)}"
        name = product_name(kinds[left], kinds[right])
        if name is None or (kinds[left] == "uint4" and kinds[right] != "uint4"):  # uint4 is the right operand
            raise InputError(f"formats {formats.name!r}: engines have no product of the codes of {pair}.")
        units[pair] = product_unit(name)
    return units


def _one_product(section: EngineSection, formats: FormatSection, units: Mapping[str, ProductUnit]) -> str:
    """The product that a multiplier of codes does."""
    given = sorted(section.model_fields_set & {"encoding", "operand_bits", "a_bits", "b_bits"})
    if given:
        raise InputError(
            f"{', '.join(given)} belong to integer multipliers; a product of codes has widths of its own and no "
            "digits. Leave them out, or give `multiplier: booth` for integer formats."
        )
    names = {unit.name for unit in units.values()}
    if len(names) > 1:
        each = "; ".join(f"{pair}: {unit.name}" for pair, unit in units.items())
        raise InputError(
            f"A multiplier of codes does one product; formats {formats.name!r} ask for several ({each}). Give "
            "attention the codes of activations, keys and values those of weights; integers can share "
            "`multiplier: booth`."
        )
    return names.pop()


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
            _ = describe_engine(section, study.model).nest
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
    if location[:2] == ("model", "formats"):
        section = FormatSection
    return sorted(section.model_fields)
