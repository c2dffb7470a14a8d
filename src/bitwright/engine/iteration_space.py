"""The iteration space of a nest: its loops must visit every position of M, N and K once, and every bit weight once.

Source: arXiv 2503.06342, the notation: MP/MT, NP/NT and KP/KT split a dimension into spatial and temporal loops.
"""

from __future__ import annotations

from bitwright.arithmetic import encodings
from bitwright.core.errors import InputError
from bitwright.engine.nest import Loop, Nest, loops

_MOST_POSITIONS = 4096  # of K that one step takes
_MOST_BITS = 16  # of operands; the same as `tensor_engine.TensorEngine`


def check_iteration_space(nest: Nest) -> None:
    """Raise InputError when the operands cannot be read, or loops leave out or repeat positions of a dimension.

    Loops over M, N or K are tiles of each other: from the inside out, a loop's step is the number of positions of the
    loops inside it, and the outermost one runs over all of the dimension. M and N may have no loop (one result).
    """
    for name in ("a", "b"):
        value = nest.words.get(name)
        if value is None or value.state or not value.signed or value.bits > _MOST_BITS:
            raise InputError(
                f"Nest {nest.name!r}: operand {name!r} must be declared as signed words of at most {_MOST_BITS} bits."
            )
    for dimension in ("M", "N", "K"):
        _check_tiles(nest, dimension)
    weights = _by_index(nest, "BW")
    if nest.encoding is None:
        if weights:
            raise InputError(f"Nest {nest.name!r} has a loop over bit weights, but names no encoding of them.")
        return
    bits = nest.words["a"].bits
    digits = encodings.get(nest.encoding).digit_count(bits)
    for loop in weights:
        if loop.index != "bw" or loop.extent != digits or loop.stride != 1:
            raise InputError(
                f"Nest {nest.name!r}: {nest.encoding} makes {digits} digits of {bits} bits, so the loop over them is "
                f"`bw in {digits}`; loop {loop.index!r} takes {loop.extent} steps of {loop.stride}."
            )


def _by_index(nest: Nest, dimension: str) -> list[Loop]:
    """One loop of each index over a dimension. Raises InputError for one index with two ranges."""
    found: dict[str, Loop] = {}
    for loop in loops(nest.body):
        if loop.dimension != dimension:
            continue
        first = found.setdefault(loop.index, loop)
        if (first.extent, first.stride) != (loop.extent, loop.stride):
            raise InputError(f"Nest {nest.name!r}: loop {loop.index!r} stands for two different ranges.")
    return list(found.values())


def _check_tiles(nest: Nest, dimension: str) -> None:
    tiles = _by_index(nest, dimension)
    if not tiles and dimension != "K":
        return
    covered = 1
    for loop in sorted(tiles, key=lambda loop: (loop.extent is None, loop.stride, loop.extent or 0)):
        if loop.stride != covered:
            raise InputError(
                f"Nest {nest.name!r}: loop {loop.index!r} steps by {loop.stride}, but the loops inside it visit "
                f"{covered} position(s) of {dimension}, so that positions are left out or taken twice."
            )
        if loop.extent is None:
            return
        covered *= loop.extent
        if dimension == "K" and covered > _MOST_POSITIONS:
            raise InputError(
                f"Nest {nest.name!r} takes {covered} positions of K in one step; the most is {_MOST_POSITIONS}."
            )
    raise InputError(
        f"Nest {nest.name!r} visits {covered} position(s) of {dimension} only; its outermost loop over {dimension} "
        f"must run over all of it, as in `for {dimension.lower()}t in {dimension} step {covered}`."
    )
