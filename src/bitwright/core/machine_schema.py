"""The shape of a machine description: pydantic models of devices, memories, links, clusters and spatial arrays.

Every figure is a `Quantity` in SI base units with its evidence and source; `core.machine` reads them from files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from bitwright.core.errors import InputError, UnknownNameError
from bitwright.core.quantity import Evidence, Quantity, format_value, parse_quantity


def _figure(unit: str, example: str) -> Callable[[Any], Any]:
    """A validator that reads a figure in `unit`: text, {value, source, evidence}, or a Quantity already read."""

    def read(given: Any) -> Any:
        if isinstance(given, Quantity):
            return given
        source, evidence, value = "", Evidence.PUBLISHED, given
        if isinstance(given, Mapping):
            extra = set(given) - {"value", "source", "evidence"}
            if extra or "value" not in given:
                raise ValueError(f"expected {{value, source, evidence}}, given the keys {sorted(map(str, given))}")
            value, source = given["value"], str(given.get("source", ""))
            evidence = read_evidence(given.get("evidence", Evidence.PUBLISHED))
            if not source:
                raise ValueError(f"the figure {value!r} has no source; say where it comes from")
        if value is None or isinstance(value, (bool, list)):
            raise ValueError(f'expected a figure such as "{example}", given {value!r}')
        try:
            number = parse_quantity(value, unit)
        except InputError as error:
            raise ValueError(f'{error} Expected a figure such as "{example}".') from None
        if number < 0:
            raise ValueError(f"{value!r} is negative")
        return Quantity(number, unit, evidence, source)

    return read


def read_evidence(given: Any) -> Evidence:
    """The `Evidence` named `given`. Raises ValueError, listing the kinds, for any other value."""
    try:
        return Evidence(given)
    except ValueError:
        raise ValueError(f"unknown evidence {given!r}; one of {', '.join(Evidence)}") from None


def _positive(figure: Quantity) -> Quantity:
    if figure.value <= 0:
        raise ValueError("must be greater than zero")
    return figure


Seconds = Annotated[Quantity, BeforeValidator(_figure("s", "2 us"))]
Bytes = Annotated[Quantity, BeforeValidator(_figure("B", "80 GiB"))]
BytesPerSecond = Annotated[Quantity, BeforeValidator(_figure("B/s", "2.0 TB/s"))]
Hertz = Annotated[Quantity, BeforeValidator(_figure("Hz", "1.41 GHz"))]
Watts = Annotated[Quantity, BeforeValidator(_figure("W", "400 W"))]
SquareMetres = Annotated[Quantity, BeforeValidator(_figure("m**2", "826 mm**2"))]
JoulesPerByte = Annotated[Quantity, BeforeValidator(_figure("J/B", "3.9 pJ/bit"))]
Joules = Annotated[Quantity, BeforeValidator(_figure("J", "0.04 pJ"))]
Bits = Annotated[Quantity, BeforeValidator(_figure("bit", "64 bit"))]
Count = Annotated[Quantity, BeforeValidator(_figure("", "108"))]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)


def _read_rates(given: Any) -> Any:
    """Peak rates by number format; "FLOP/s" for floating point, "OP/s" for integers (two per multiply-accumulate)."""
    if not isinstance(given, Mapping):
        raise ValueError('expected rates by number format, such as {fp16: "312 TFLOP/s", int8: "624 TOP/s"}')
    rates = {}
    for name, rate in given.items():
        unit = "OP/s" if str(name).startswith(("int", "uint")) else "FLOP/s"
        try:
            rates[str(name)] = _positive(_figure(unit, f"312 T{unit}")(rate))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return rates


Rates = Annotated[dict[str, Quantity], BeforeValidator(_read_rates)]


class Compute(_Model):
    """Peak rates of the matrix and the vector units, by number format, in operations per second.

    A multiply-accumulate counts as two operations. A format a unit does not have is not listed.
    """

    matrix: Rates = Field(default_factory=dict)
    vector: Rates = Field(default_factory=dict)


class Tile(_Model):
    """The output tile one core computes at a time in a matrix product, and the step of its inner loop."""

    m: Count
    n: Count
    k: Count


class Memory(_Model):
    """One level of a device's memory hierarchy. `bandwidth` is the peak for reads and writes together.

    `per` says whether capacity and bandwidth are those of the whole device or of one core. `sustained` is the bandwidth
    a streaming kernel was measured to reach, when somebody measured it.
    """

    capacity: Bytes
    bandwidth: BytesPerSecond | None = None
    sustained: BytesPerSecond | None = None
    latency: Seconds | None = None
    read_energy: JoulesPerByte | None = None
    write_energy: JoulesPerByte | None = None
    per: Literal["device", "core"] = "device"


class Device(_Model):
    """A processor: compute, memories from the nearest to the farthest (the last is main memory), power, area."""

    title: str = ""
    kind: Literal["gpu", "cpu", "accelerator"] = "gpu"
    count: Count = Quantity(1, "", Evidence.PUBLISHED, "one device")
    compute: Compute = Compute()
    clock: Hertz | None = None
    cores: Count | None = None
    tile: Tile | None = None
    launch_overhead: Seconds | None = None
    memories: dict[str, Memory] = Field(min_length=1)
    power: Watts | None = None
    idle_power: Watts | None = None
    area: SquareMetres | None = None
    process: str = ""

    @property
    def main_memory(self) -> Memory:
        """The farthest memory, where tensors live."""
        return list(self.memories.values())[-1]


class Link(_Model):
    """A connection. `bandwidth` is per direction and device (per node, for a network); `latency` is that of one hop."""

    type: str
    topology: Literal["all-to-all", "ring", "switch", "mesh", "torus", "fat-tree", "host", "point-to-point"]
    bandwidth: BytesPerSecond
    latency: Seconds
    energy: JoulesPerByte | None = None
    between: tuple[str, ...] = ()


class ArrayMemory(_Model):
    """A memory of a spatial accelerator, described by one of its instances.

    `operands` are those it holds: W (weights), I (inputs), O (outputs). `shared_along` lists the array dimensions that
    share one instance: none for a register in every cell, all for a global buffer. An access moves up to `read_width`
    or `write_width` bits in a cycle at `read_energy` or `write_energy`; a narrower one costs its share, in steps of
    `granule`. `ports`: "one" for all traffic, "read-and-write" for one of each, "dedicated" for one per operand,
    direction and neighbour.
    """

    operands: tuple[Literal["W", "I", "O"], ...] = Field(min_length=1)
    size: Bits
    read_width: Bits
    write_width: Bits
    granule: Bits
    read_energy: Joules
    write_energy: Joules
    shared_along: tuple[str, ...] = ()
    ports: Literal["one", "read-and-write", "dedicated"] = "read-and-write"


class ArrayDimension(_Model):
    """One dimension of the array: its size and the loop unrolled along it; `systolic` when data moves cell by cell."""

    size: Count
    loop: Literal["output_channel", "input_channel", "column", "row", "batch"]
    systolic: bool = False


class Accelerator(_Model):
    """A spatial array with its memories, nearest first: what `core.mapping` maps loop nests onto."""

    dimensions: dict[str, ArrayDimension] = Field(min_length=1)
    mac_energy: Joules
    clock: Hertz
    weight_bits: Count
    input_bits: Count
    output_bits: Count
    partial_sum_bits: Count
    memories: dict[str, ArrayMemory] = Field(min_length=1)

    @model_validator(mode="after")
    def _check(self) -> Accelerator:
        for name, memory in self.memories.items():
            unknown = set(memory.shared_along) - set(self.dimensions)
            if unknown:
                raise ValueError(f"memory {name!r} is shared along {sorted(unknown)}, not dimensions of the array")
        for operand in ("W", "I", "O"):
            if not any(operand in memory.operands for memory in self.memories.values()):
                raise ValueError(f"no memory holds operand {operand}")
        last = list(self.memories.values())[-1]
        if set(last.operands) != {"W", "I", "O"}:
            raise ValueError("the last memory must hold all of W, I and O")
        return self

    @property
    def cells(self) -> int:
        """Multiply-accumulators of the array."""
        total = 1
        for dimension in self.dimensions.values():
            total *= int(dimension.size.value)
        return total


class Machine(_Model):
    """A machine: the devices of one node, the links between them, the number of nodes and their network."""

    name: str
    title: str = ""
    devices: dict[str, Device] = Field(default_factory=dict)
    links: dict[str, Link] = Field(default_factory=dict)
    nodes: Count = Quantity(1, "", Evidence.PUBLISHED, "one node")
    network: Link | None = None
    accelerator: Accelerator | None = None
    notes: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> Machine:
        if not self.devices and self.accelerator is None:
            raise ValueError("a machine needs `devices` or an `accelerator`")
        if self.nodes.value > 1 and self.network is None:
            raise ValueError("more than one node needs a `network`")
        for name, link in self.links.items():
            unknown = set(link.between) - set(self.devices)
            if unknown:
                raise ValueError(f"link {name!r} is between unknown devices {sorted(unknown)}")
        return self

    def device(self, name: str | None = None) -> Device:
        """A device by name; without a name the first one. Raises UnknownNameError or InputError."""
        if not self.devices:
            raise InputError(f"Machine {self.name!r} describes an accelerator and no general device.")
        if name is None:
            return next(iter(self.devices.values()))
        if name not in self.devices:
            raise UnknownNameError(f"device of machine {self.name!r}", name, self.devices)
        return self.devices[name]

    @property
    def device_count(self) -> int:
        """Devices of the first kind, over all nodes."""
        return int(self.device().count.value * self.nodes.value)

    def figures(self) -> Iterator[tuple[str, Quantity]]:
        """Every figure with its key path."""
        yield from _figures(self, "")

    def describe(self) -> list[dict[str, str]]:
        """Rows for a table: figure (its key path), value, evidence, source."""
        return [
            {"figure": path, "value": format_value(figure.value, figure.unit), "evidence": str(figure.evidence),
             "source": figure.source}
            for path, figure in self.figures()
        ]  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        """A JSON value that `machine_from_data` reads back."""
        return dict(_plain(self))

    def to_yaml(self) -> str:
        """A machine file, every figure in its long form, that `load_machine` reads back."""
        return yaml.safe_dump(self.to_json(), sort_keys=False, allow_unicode=True, width=110)


def _figures(value: Any, path: str) -> Iterator[tuple[str, Quantity]]:
    if isinstance(value, Quantity):
        yield path, value
    elif isinstance(value, BaseModel):
        for name in type(value).model_fields:
            yield from _figures(getattr(value, name), f"{path}.{name}" if path else name)
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from _figures(item, f"{path}.{name}")


def _plain(value: Any) -> Any:
    if isinstance(value, Quantity):
        written: Any = f"{value.value!r} {value.unit}" if value.unit else value.value
        return {"value": written, "source": value.source, "evidence": str(value.evidence)}
    if isinstance(value, BaseModel):
        fields = {name: getattr(value, name) for name in type(value).model_fields}
        return {name: _plain(item) for name, item in fields.items() if item not in (None, "", (), {})}
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


class MemoryPreset(_Model):
    """A DRAM channel or stack for an engine: peak bandwidth and energy, each with its source."""

    title: str
    bandwidth: BytesPerSecond
    energy: JoulesPerByte
    channel_bits: Count
    notes: str = ""
