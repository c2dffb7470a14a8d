"""The workload: a directed acyclic graph of operators, each a loop nest over named extents.

An operator names its loops and their extents; its tensors are affine projections of those loops. Work, bytes and
reuse are derived from these, never stored beside them, so they cannot disagree.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from types import MappingProxyType
from typing import Any

from bitwright.core.errors import InputError

# Bits per element, block scales included for the block formats.
FORMAT_BITS: Mapping[str, float] = MappingProxyType({
    "fp64": 64, "fp32": 32, "tf32": 32, "fp16": 16, "bf16": 16, "fp8": 8, "int64": 64, "int32": 32, "int16": 16,
    "int8": 8, "uint8": 8, "int6": 6, "int4": 4, "uint4": 4, "int2": 2, "bool": 8,
    "q8_0": 8.5, "q4_0": 4.5, "q4_1": 5.0, "q4_k": 4.5, "q6_k": 6.5625,
    "complex64": 64, "complex128": 128,
})  # fmt: skip


class Kind(StrEnum):
    """What an operator does, as far as costing needs to know."""

    MATMUL = "matmul"  # loops b m n k
    CONVOLUTION = "convolution"  # loops b g c o y x r s, in 3D also z t (c and o per group)
    ATTENTION = "attention"  # loops b h q k d e: scores over d, context over e; causal pairs counted by `density`
    SOFTMAX = "softmax"
    NORMALISATION = "normalisation"
    ELEMENTWISE = "elementwise"
    GATHER = "gather"
    REDUCTION = "reduction"
    COPY = "copy"  # transposes, concatenations, layout changes
    SCAN = "scan"
    COLLECTIVE = "collective"
    UNKNOWN = "unknown"  # kept, counted by bytes, and named in the report


class Role(StrEnum):
    """What a tensor is to the network; decides where it lives and whether it is read again."""

    WEIGHT = "weight"
    ACTIVATION = "activation"
    KV = "kv"
    GRADIENT = "gradient"
    OPTIMIZER = "optimizer"
    INDEX = "index"


# One axis of a tensor: an affine expression over loops, {"y": 2, "r": 1} for a convolution of stride 2.
Axis = Mapping[str, int]


@dataclass(frozen=True)
class Tensor:
    """A tensor as one operator sees it: which loops index each of its axes.

    `name` ties the graph together: the operator that writes a name feeds those that read it. `statistics` holds
    figures measured on real data (for example "sparsity", "digit_histogram", "sigma"). `stored_bits` are the bits per
    element of a format that is not in `FORMAT_BITS`, scales included: they depend on the shape.
    """

    name: str
    axes: tuple[Axis, ...]
    format: str = "fp32"
    role: Role = Role.ACTIVATION
    statistics: Mapping[str, Any] = field(default_factory=dict)
    size: int | None = None  # stored elements, where the loops do not give them (a gathered table, shared KV heads)
    stored_bits: float | None = None

    def shape(self, loops: Mapping[str, int]) -> tuple[int, ...]:
        """Extent of every axis: 1 + the sum of coefficient * (extent - 1)."""
        return tuple(1 + sum(step * (loops[loop] - 1) for loop, step in axis.items()) for axis in self.axes)

    def elements(self, loops: Mapping[str, int]) -> int:
        """Elements touched."""
        return self.size if self.size is not None else math.prod(self.shape(loops))

    def bytes(self, loops: Mapping[str, int]) -> float:
        """Bytes touched, at the format's bits per element."""
        return self.elements(loops) * self.bits / 8

    @property
    def bits(self) -> float:
        """Stored bits per element."""
        return FORMAT_BITS[self.format] if self.stored_bits is None else self.stored_bits


@dataclass(frozen=True)
class Gemm:
    """`batch` independent products (m, k) @ (k, n)."""

    batch: int
    m: int
    n: int
    k: int
    density: float = 1.0  # fraction of the multiply-accumulates whose result is used (about 0.5 for causal attention)

    @property
    def macs(self) -> int:
        """Multiply-accumulates, before `density`."""
        return self.batch * self.m * self.n * self.k


@dataclass(frozen=True)
class Operator:
    """A loop nest: named extents, input and output tensors.

    `flops_per_point` is the work of one innermost iteration (2 for a multiply-accumulate); `density` the fraction of
    iterations that are done (causal attention); `target` the name the source framework gives the operation.
    Raises InputError for extents below 1 and unknown formats.
    """

    name: str
    kind: Kind
    loops: Mapping[str, int]
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    flops_per_point: float = 2.0
    density: float = 1.0
    target: str = ""
    attributes: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for loop, extent in self.loops.items():
            if extent < 1:
                raise InputError(
                    f"Operator {self.name!r}: loop {loop!r} has extent {extent}; every extent must be >= 1."
                )
        for tensor in (*self.inputs, *self.outputs):
            if tensor.stored_bits is None and tensor.format not in FORMAT_BITS:
                raise InputError(
                    f"Operator {self.name!r}: tensor {tensor.name!r} has unknown format {tensor.format!r}."
                )

    @property
    def points(self) -> int:
        """Iterations of the nest, before `density`."""
        if self.kind is Kind.ATTENTION:  # two products that share the loops b h q k
            shared = math.prod(self.loops[loop] for loop in ("b", "h", "q", "k"))
            return shared * (self.loops["d"] + self.loops["e"])
        return math.prod(self.loops.values())

    @property
    def macs(self) -> int:
        """Multiply-accumulates, all of them: what a dense engine executes. Zero for operators without products."""
        return self.points if self.kind in (Kind.MATMUL, Kind.CONVOLUTION, Kind.ATTENTION) else 0

    @property
    def flops(self) -> float:
        """Floating-point (or integer) operations, all of them."""
        return self.points * self.flops_per_point if self.kind not in (Kind.GATHER, Kind.COPY, Kind.UNKNOWN) else 0.0

    @property
    def bytes_read(self) -> float:
        """Bytes of all inputs, each read once; of a table that is gathered from (`size` given), what is gathered."""
        if self.kind is not Kind.GATHER:
            return sum(tensor.bytes(self.loops) for tensor in self.inputs)
        most = sum(tensor.elements(self.loops) for tensor in self.outputs)
        read = 0.0
        for tensor in self.inputs:
            elements = tensor.elements(self.loops)
            read += (elements if tensor.size is None else min(elements, most)) * tensor.bits / 8
        return read

    @property
    def bytes_written(self) -> float:
        """Bytes of all outputs, each written once."""
        return sum(tensor.bytes(self.loops) for tensor in self.outputs)

    @property
    def bytes(self) -> float:
        """Compulsory traffic: every tensor moved once."""
        return self.bytes_read + self.bytes_written

    @property
    def intensity(self) -> float:
        """Operations per byte of compulsory traffic."""
        return self.flops / self.bytes if self.bytes else 0.0

    def gemms(self) -> tuple[Gemm, ...]:
        """The matrix products an engine executes for this operator; empty when it has none.

        A convolution is lowered as im2col: m = output positions, n = output channels of a group, k = c*r*s. A
        transposed one (attribute `transposed`) as col2im: m = input positions, n = o*r*s, k = c.
        """
        size = self.loops
        if self.kind is Kind.MATMUL:
            return (Gemm(size.get("b", 1), size["m"], size["n"], size["k"], self.density),)
        if self.kind is Kind.CONVOLUTION:
            positions = size["b"] * size["y"] * size["x"] * size.get("z", 1)
            taps = size["r"] * size["s"] * size.get("t", 1)
            if self.attributes.get("transposed"):
                return (Gemm(size.get("g", 1), positions, size["o"] * taps, size["c"]),)
            return (Gemm(size.get("g", 1), positions, size["o"], size["c"] * taps),)
        if self.kind is Kind.ATTENTION:
            batch = size["b"] * size["h"]
            return (
                Gemm(batch, size["q"], size["k"], size["d"], self.density),
                Gemm(batch, size["q"], size["e"], size["k"], self.density),
            )
        return ()

    def with_formats(self, formats: Mapping[Role, str]) -> Operator:
        """The same operator with the tensors of each role in another format (index tensors stay as they are)."""

        def convert(tensor: Tensor) -> Tensor:
            name = formats.get(tensor.role)
            return tensor if name is None else replace(tensor, format=name, stored_bits=None)

        return replace(self, inputs=tuple(map(convert, self.inputs)), outputs=tuple(map(convert, self.outputs)))


@dataclass(frozen=True)
class Workload:
    """Operators in an order that respects their dependencies; edges follow from tensor names.

    `notes` are facts the reader of a report must know (operators not understood, assumptions made while importing).
    """

    name: str
    operators: tuple[Operator, ...]
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        names = set()
        for operator in self.operators:
            if operator.name in names:
                raise InputError(f"Workload {self.name!r} has two operators named {operator.name!r}.")
            names.add(operator.name)

    def __iter__(self) -> Iterator[Operator]:
        return iter(self.operators)

    def __len__(self) -> int:
        return len(self.operators)

    def edges(self) -> list[tuple[int, int]]:
        """Dependencies as (producer index, consumer index) pairs, from tensor names."""
        writer: dict[str, int] = {}
        pairs: list[tuple[int, int]] = []
        for index, operator in enumerate(self.operators):
            pairs.extend({(writer[tensor.name], index) for tensor in operator.inputs if tensor.name in writer})
            writer.update({tensor.name: index for tensor in operator.outputs})
        return pairs

    @property
    def macs(self) -> int:
        """Multiply-accumulates of all operators."""
        return sum(operator.macs for operator in self.operators)

    @property
    def flops(self) -> float:
        """Operations of all operators."""
        return sum(operator.flops for operator in self.operators)

    @property
    def bytes(self) -> float:
        """Compulsory traffic, operator by operator (no fusion)."""
        return sum(operator.bytes for operator in self.operators)

    @property
    def unknown(self) -> tuple[Operator, ...]:
        """Operators whose kind is not known; they are counted by bytes only."""
        return tuple(operator for operator in self.operators if operator.kind is Kind.UNKNOWN)

    def tensors(self, role: Role) -> dict[str, tuple[int, float]]:
        """Distinct tensors of a role: name -> (elements, bytes). A tensor read by two operators counts once."""
        found: dict[str, tuple[int, float]] = {}
        for operator in self.operators:
            for tensor in (*operator.inputs, *operator.outputs):
                if tensor.role is role:
                    size = (tensor.elements(operator.loops), tensor.bytes(operator.loops))
                    found[tensor.name] = max(found.get(tensor.name, (0, 0.0)), size)
        return found

    @property
    def parameters(self) -> int:
        """Elements of all distinct weights."""
        return sum(elements for elements, _ in self.tensors(Role.WEIGHT).values())

    def with_formats(self, formats: Mapping[Role, str]) -> Workload:
        """The workload with the tensors of each role in another format."""
        return replace(self, operators=tuple(operator.with_formats(formats) for operator in self.operators))
