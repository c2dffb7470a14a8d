"""Builders of operators from tensor shapes: the loops and axes of products, convolutions, attention and the rest."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bitwright.core.workload import Axis, Kind, Operator, Role, Tensor

# Operations per element by definition, every addition, multiplication, comparison, division and exponential as one.
SOFTMAX_FLOPS = 5.0  # maximum, subtract, exponential, sum, divide
LAYER_NORM_FLOPS = 8.0  # sum; subtract, square, sum; subtract, scale; weight, bias
RMS_NORM_FLOPS = 4.0  # square, sum; scale, weight
BATCH_NORM_FLOPS = 2.0  # folded scale and shift
ADAM_FLOPS = 14.0  # two moving averages (3 + 4), bias corrections (2), root, add, divide, scale, subtract
ACTIVATION_FLOPS: Mapping[str, float] = {"gelu": 8.0, "silu": 4.0, "sigmoid": 3.0, "tanh": 4.0, "hardswish": 4.0,
                                         "mish": 6.0, "softplus": 3.0, "elu": 3.0, "hardsigmoid": 3.0}  # fmt: skip


@dataclass(frozen=True)
class Operand:
    """A whole tensor before loops are assigned to it."""

    name: str
    shape: tuple[int, ...]
    format: str = "fp32"
    role: Role = Role.ACTIVATION
    stored: int | None = None  # elements in memory when fewer than the shape says (an expanded view)

    @property
    def elements(self) -> int:
        """Elements in memory."""
        return math.prod(self.shape) if self.stored is None else self.stored

    def tensor(self, axes: Iterable[Axis], size: int | None = None) -> Tensor:
        """The operand with loops on its axes; `size` overrides the extent the loops give."""
        return Tensor(self.name, tuple(axes), self.format, self.role, size=self.stored if size is None else size)


def _axes(*names: str) -> list[Axis]:
    return [{name: 1} for name in names]


def product(
    name: str, left: Operand, right: Operand, out: Operand, batch: int, m: int, n: int, k: int,
    *, shared_right: bool = False, extra: Sequence[Operand] = (), target: str = "", density: float = 1.0,
    attributes: Mapping[str, Any] | None = None,
) -> Operator:  # fmt: skip
    """`batch` products (m, k) @ (k, n). `shared_right`: one right operand for the whole batch, so it joins m.

    Element counts are those of the operands as stored, so an operand broadcast over part of the batch counts once.
    `extra` operands (a bias, an addend) are read beside the product.
    """
    if shared_right and batch > 1:
        m, batch = m * batch, 1
    loops = {"b": batch, "m": m, "n": n, "k": k}

    def side(operand: Operand, rows: str, columns: str, batched: bool = True) -> Tensor:
        names = ("b", rows, columns) if batched and batch > 1 else (rows, columns)
        extent = math.prod(loops[loop] for loop in names)
        return operand.tensor(_axes(*names), None if extent == operand.elements else operand.elements)

    tensors = [side(left, "m", "k"), side(right, "k", "n", not shared_right)]
    for operand in extra:
        if operand.shape == (n,):
            tensors.append(operand.tensor(_axes("n")))
        else:
            tensors.append(operand.tensor((), operand.elements))
    return Operator(name, Kind.MATMUL, loops, tuple(tensors), (side(out, "m", "n"),), density=density, target=target,
                    attributes=attributes or {})  # fmt: skip


_OUTER, _TAPS = ("z", "y", "x"), ("t", "r", "s")


def convolution(
    name: str, data: Operand, weight: Operand, out: Operand, stride: Sequence[int], dilation: Sequence[int],
    groups: int, *, transposed: bool = False, extra: Sequence[Operand] = (), target: str = "",
) -> Operator:  # fmt: skip
    """A convolution in 1 to 3 dimensions, (batch, channels, *space) with weight (outputs, inputs/groups, *taps).

    A transposed convolution has weight (inputs, outputs/groups, *taps); its loops y, x run over input positions and its
    output axes are the affine ones. Element counts are those of the tensors as stored (padding is not read) or, when a
    stride skips elements, those touched.
    """
    rank = len(weight.shape) - 2
    outer, taps = _OUTER[-rank:], _TAPS[-rank:]
    swept = data if transposed else out
    batch = data.shape[0] if len(data.shape) == rank + 2 else 1
    inputs, outputs = data.shape[-rank - 1] // groups, out.shape[-rank - 1] // groups
    loops = {"b": batch, "g": groups, "c": inputs, "o": outputs, "y": 1, "x": 1, "r": 1, "s": 1}
    loops |= dict(zip(outer, swept.shape[-rank:], strict=True)) | dict(zip(taps, weight.shape[2:], strict=True))
    window: list[Axis] = [{o: step, t: gap} for o, t, step, gap in zip(outer, taps, stride, dilation, strict=True)]
    c_axis: Axis = {"g": inputs, "c": 1}
    o_axis: Axis = {"g": outputs, "o": 1}
    affine = out if transposed else data
    touched = math.prod(affine.shape[:-rank])
    for axis, extent in zip(window, affine.shape[-rank:], strict=True):
        reach = 1 + sum(step * (loops[loop] - 1) for loop, step in axis.items())
        touched *= extent if transposed else min(extent, reach, math.prod(loops[loop] for loop in axis))
    if transposed:
        data_tensor = data.tensor(({"b": 1}, c_axis, *_axes(*outer)))
        weight_tensor = weight.tensor((c_axis, {"o": 1}, *_axes(*taps)))
        out_tensor = out.tensor(({"b": 1}, o_axis, *window), touched)
    else:
        data_tensor = data.tensor(({"b": 1}, c_axis, *window), touched)
        weight_tensor = weight.tensor((o_axis, {"c": 1}, *_axes(*taps)))
        out_tensor = out.tensor(({"b": 1}, o_axis, *_axes(*outer)))
    biases = [each.tensor([o_axis] if len(each.shape) == 1 else (), each.elements) for each in extra]
    return Operator(name, Kind.CONVOLUTION, loops, (data_tensor, weight_tensor, *biases), (out_tensor,), target=target,
                    attributes={"transposed": True} if transposed else {})  # fmt: skip


def causal_density(queries: int, keys: int, offset: int | None = None) -> float:
    """Fraction of query-key pairs a causal mask keeps; query i sees keys 0 .. offset + i.

    `offset` defaults to keys - queries: the queries are the last positions of the context.
    """
    offset = keys - queries if offset is None else offset
    full = max(0, min(queries, keys - offset))  # queries before the one that sees every key
    kept = full * (offset + 1) + full * (full - 1) // 2 + (queries - full) * keys
    return kept / (queries * keys)


def attention(
    name: str, query: Operand, key: Operand, value: Operand, out: Operand, *, batch: int, heads: int, kv_heads: int,
    queries: int, keys: int, depth: int, value_depth: int, density: float = 1.0, extra: Sequence[Operand] = (),
    target: str = "",
) -> Operator:  # fmt: skip
    """Fused attention: scores, softmax and context in one operator; scores are not stored.

    Query heads in groups of heads/kv_heads share keys and values (`heads_per_kv_head`), which count once.
    """
    loops = {"b": batch, "h": heads, "q": queries, "k": keys, "d": depth, "e": value_depth}
    shared = kv_heads != heads

    def cached(operand: Operand, width: str) -> Tensor:
        size = batch * kv_heads * keys * loops[width] if shared else None
        return operand.tensor(_axes("b", "h", "k", width), size)

    inputs = (query.tensor(_axes("b", "h", "q", "d")), cached(key, "d"), cached(value, "e"),
              *(each.tensor((), each.elements) for each in extra))  # fmt: skip
    return Operator(
        name, Kind.ATTENTION, loops, inputs, (out.tensor(_axes("b", "h", "q", "e")),), density=density, target=target,
        attributes={"heads_per_kv_head": heads // kv_heads} if shared else {},
    )  # fmt: skip


def pointwise(
    name: str, kind: Kind, inputs: Sequence[Operand], outputs: Sequence[Operand], shape: Sequence[int],
    flops: float = 1.0, *, reduced: Sequence[int] = (), target: str = "",
) -> Operator:  # fmt: skip
    """An operator that visits every point of `shape` once, with `flops` operations each.

    Operands align with the trailing axes of `shape` (broadcasting); outputs of a reduction over the axes `reduced`
    align with the kept ones. An operand that aligns with neither keeps its element count and no axes.
    """
    names = [f"i{index}" for index in range(len(shape))]
    kept = [index for index in range(len(shape)) if index not in reduced]

    def aligned(operand: Operand) -> Tensor:
        rank = len(operand.shape)
        candidates = [list(range(len(shape)))[len(shape) - rank :]] if rank <= len(shape) else []
        candidates += [kept] if rank == len(kept) and reduced else []
        for indices in candidates:
            pairs = list(zip(operand.shape, indices, strict=True))
            if all(extent in (1, shape[index]) for extent, index in pairs):
                return operand.tensor([{} if extent == 1 else {names[index]: 1} for extent, index in pairs])
        return operand.tensor((), operand.elements)

    loops = dict(zip(names, shape, strict=True))
    tensors = (tuple(map(aligned, inputs)), tuple(map(aligned, outputs)))
    return Operator(name, kind, loops, *tensors, flops_per_point=flops, target=target)


def gather(
    name: str, table: Operand, index: Sequence[Operand], out: Operand, *, extra: Sequence[Operand] = (),
    target: str = "",
) -> Operator:  # fmt: skip
    """Rows of `table` picked by `index`; the table is stored whole, but only what is gathered counts as read."""
    operator = pointwise(name, Kind.GATHER, (*index, *extra), (out,), out.shape, 0.0, target=target)
    inputs = (table.tensor((), table.elements), *operator.inputs)
    return Operator(name, Kind.GATHER, operator.loops, inputs, operator.outputs, 0.0, target=target)
