"""Time of a BERT encoder on a GPU: padded and as PyTorch's JIT runs it, padded with fused operators, or packed.

Every kernel that a layer starts is counted: operations of the matrix unit in tiles of 128 x 128, bytes of operands and
results in half precision, one launch. Kernels run one after the other. Evidence: predicted, from the machine file
alone; the same rates for every form. Source: arXiv 2210.03052 (which operators are fused, attention A to C).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Literal, get_args

from bitwright.core.errors import InputError, UnknownNameError
from bitwright.kernels.work import Rates, Work, predict

Form = Literal["plain", "fused", "fused, packed linear layers", "packed"]
HALF = 2  # bytes
TILE = 128
SHORT = 384  # the longest sequence whose attention is one kernel


@dataclass(frozen=True)
class EncoderShape:
    """Layers, width, heads of a BERT encoder; the feed-forward is four times as wide."""

    layers: int = 12
    width: int = 768
    heads: int = 12


def _product(m: int, n: int, k: int, batch: int = 1) -> Work:
    tiles = batch * ceil(m / TILE) * ceil(n / TILE)
    padded = tiles * TILE * TILE * k * 2.0
    return Work({"matrix fp16": padded}, {"memory": HALF * batch * (m * k + k * n + m * n)}, max(tiles, 1))


def _touch(elements: float) -> Work:
    return Work({}, {"memory": HALF * elements})


def layer_kernels(shape: EncoderShape, lengths: Sequence[int], longest: int, form: Form) -> list[Work]:
    """The kernels of one layer, in order, for sequences of these lengths padded to `longest`.

    Raises UnknownNameError for another form, InputError for lengths outside 1 to `longest`.
    """
    if form not in get_args(Form):
        raise UnknownNameError("form of encoder", form, get_args(Form))
    if not lengths or min(lengths) < 1 or max(lengths) > longest:
        raise InputError(f"Lengths {list(lengths)[:8]} of sequences padded to {longest}; expected 1 to {longest}.")
    batch, width, heads = len(lengths), shape.width, shape.heads
    head = width // heads
    padded = batch * longest
    rows = sum(lengths) if form in ("packed", "fused, packed linear layers") else padded
    scores = heads * padded * longest
    kernels: list[Work] = []
    if form == "plain":
        kernels += [_product(rows, width, width) for _ in range(3)]
        kernels += [_touch(2 * rows * width) for _ in range(3)]  # heads become an outer axis
        kernels += [_product(longest, longest, head, batch * heads)]
        kernels += [_touch(2 * scores), _touch(2 * scores)]  # scale and mask (the JIT fuses them), softmax
        kernels += [_product(longest, head, longest, batch * heads), _touch(2 * rows * width)]
    else:
        kernels += [_product(rows, 3 * width, width)]
        if form == "packed" and longest <= SHORT:
            tiles = heads * sum(ceil(length / 64) for length in lengths)
            work = 4.0 * heads * head * sum((ceil(length / 16) * 16) ** 2 for length in lengths)
            kernels += [Work({"matrix fp16": work}, {"memory": HALF * 4 * rows * width}, tiles)]
        elif form == "packed":
            tiles = heads * sum(ceil(length / TILE) ** 2 for length in lengths)
            real = heads * sum(length * length for length in lengths)
            work = 2.0 * tiles * TILE * TILE * head
            kernels += [
                Work({"matrix fp16": work}, {"memory": HALF * (2 * rows * width + real)}, tiles),
                _touch(real / TILE * 4),  # partial maxima and sums
                Work({"matrix fp16": work}, {"memory": HALF * (2 * rows * width + real)}, tiles),
            ]
        else:
            kernels += [_touch(6 * padded * width)]  # bias, heads to an outer axis, padding again where it was removed
            kernels += [_product(longest, longest, head, batch * heads), _touch(2 * scores)]
            kernels += [_product(longest, head, longest, batch * heads), _touch(2 * padded * width)]
    kernels += [_product(rows, width, width)]
    kernels += [_touch(3 * rows * width)] * (2 if form == "plain" else 1)  # residual and normalisation
    kernels += [_product(rows, 4 * width, width)]
    if form != "packed":
        kernels += [_touch(8 * rows * width)]  # GELU (in the product's epilogue where packed)
    kernels += [_product(rows, width, 4 * width)]
    kernels += [_touch(3 * rows * width)] * (2 if form == "plain" else 1)
    return kernels


def encoder_time(shape: EncoderShape, lengths: Sequence[int], longest: int, form: Form, rates: Rates) -> float:
    """Seconds of all layers. Raises as `layer_kernels` and `work.predict`."""
    return shape.layers * sum(predict(each, rates).time_s for each in layer_kernels(shape, lengths, longest, form))
