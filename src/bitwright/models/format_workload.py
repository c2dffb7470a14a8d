"""A workload in number formats: what `execute_in` runs, as stored bits of every tensor and sums of every product."""

from __future__ import annotations

from dataclasses import dataclass, replace

from bitwright.arithmetic import formats
from bitwright.core.errors import InputError
from bitwright.core.workload import Kind, Operator, Role, Tensor, Workload
from bitwright.engine.mapping import ScaleGroups
from bitwright.models.format_execution import FormatAssignment

_UNQUANTISED = "fp32"


def in_formats(workload: Workload, assignment: FormatAssignment) -> Workload:
    """The workload with every tensor in its format: weights of products, queries, keys and values of attention, and
    everything else between operators as activations; an operand without a format is fp32.

    Bits per element count the scales, which lie along the axis that the product sums over, and along the channels of
    a head for keys and values. The gains of norms stay fp32, as they do in `execute_in`, and so does an embedding table
    that no product reads; one that is tied to the output layer is stored once, in the format of weights (`execute_in`
    looks tokens up in the unrounded table).
    """
    multiplied = {
        tensor.name: operator.loops["k"]
        for operator in workload
        if operator.kind is Kind.MATMUL
        for tensor in operator.inputs
        if tensor.role is Role.WEIGHT
    }
    attended: dict[str, tuple[str | None, int]] = {}
    for operator in workload:
        if operator.kind is Kind.ATTENTION:
            names = (assignment.attention, assignment.keys, assignment.values)
            sizes = (operator.loops["d"], operator.loops["d"], operator.loops["e"])
            for tensor, name, channels in zip(operator.inputs[:3], names, sizes, strict=False):
                attended[tensor.name] = name, channels

    def convert(operator: Operator, tensor: Tensor) -> Tensor:
        if tensor.role is Role.INDEX:
            return tensor
        shape = tensor.shape(operator.loops)  # () for a constant, and for a table given by its size
        name, row = (assignment.activations, shape[-1]) if shape else (None, 1)
        if tensor.name in attended:
            name, row = attended[tensor.name]
        elif tensor.role is Role.KV:
            name = assignment.keys
        elif tensor.role is Role.WEIGHT:
            name, row = (assignment.weights, multiplied[tensor.name]) if tensor.name in multiplied else (None, row)
        if name is None:
            return replace(tensor, format=_UNQUANTISED, stored_bits=None)
        elements = tensor.elements(operator.loops)
        rows = (elements // row, row) if elements % row == 0 else (1, elements)
        return replace(tensor, format=name, stored_bits=formats.parse(name).bits_per_element(rows))

    operators = (
        replace(
            operator,
            inputs=tuple(convert(operator, tensor) for tensor in operator.inputs),
            outputs=tuple(convert(operator, tensor) for tensor in operator.outputs),
        )
        for operator in workload
    )
    return replace(workload, operators=tuple(operators))


@dataclass(frozen=True)
class FormatGroups:
    """The `engine.mapping.Groups` of a model in number formats: of linear layers, and of both products of attention."""

    linear: ScaleGroups
    scores: ScaleGroups
    mixed: ScaleGroups

    def __call__(self, operator: Operator, index: int) -> ScaleGroups:
        """Of product number `index` of an operator."""
        if operator.kind is not Kind.ATTENTION:
            return self.linear
        return self.mixed if index else self.scores


def scale_groups(assignment: FormatAssignment) -> FormatGroups:
    """Over how many codes the products of each operator sum before a scale changes.

    The groups of both operands of a linear layer, and of queries and keys, must divide one another; those of values
    lie along the channels of a head, which are columns of their product. Raises InputError where they do not divide.
    """
    return FormatGroups(
        ScaleGroups(k=_common(assignment.weights, assignment.activations)),
        ScaleGroups(k=_common(assignment.attention, assignment.keys)),
        ScaleGroups(k=_common(assignment.attention, None), n=_common(assignment.values, None)),
    )


def _common(one: str | None, other: str | None) -> int | None:
    sizes = [size for name in (one, other) if name is not None and (size := formats.group_size(formats.parse(name)))]
    if len(sizes) == 2 and max(sizes) % min(sizes):
        raise InputError(f"Groups of {one} and {other} do not divide one another; take group sizes that do.")
    return min(sizes, default=None)
