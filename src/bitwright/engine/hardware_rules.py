"""Which nests the hardware generator builds, and so which nests have cycles to count."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bitwright.core.errors import InputError
from bitwright.engine.nest import Operation, loops, placed_steps

if TYPE_CHECKING:  # cycle counts of engines refuse what has no hardware too
    from bitwright.engine.tensor_engine import TensorEngine


def check_hardware(engine: TensorEngine) -> None:
    """Raise InputError for nests that can be evaluated but not generated."""
    nest = engine.nest
    inside = list(loops(nest.body))
    if any(loop.index == "bw" and not loop.spatial and loop.extent == 1 for loop in loops(nest.body)):
        raise InputError(
            f"{nest.name}: {engine.a_bits}-bit operands have one digit in encoding {engine.encoding!r}, so there are "
            "no bit weights to take one after the other; widen A or leave out `roll bw` (opt2 to opt4e)."
        )
    for loop in inside:
        if loop.sparse and (engine.dataflow not in ("os", "matrix2d") or loop.dimension != "K" or engine.passes == 1):
            raise InputError(
                f"{nest.name}: hardware visits non-zero digits of several positions of K at one bit weight, in os and "
                f"matrix2d arrays (opt3), not loop {loop.index!r} of a {engine.dataflow} array."
            )
        if loop.index == "np" and any(inner.index == "mp" for inner in loops(loop.body)):
            raise InputError(f"{nest.name}: hardware is rows of columns; the loop mp stands around np.")
    for step, outside in placed_steps(nest.body):
        temporal = [loop.index for loop in outside if loop.index == "bw" and not loop.spatial]
        inside_k = any(loop.index == "kt" for loop in outside)
        if step.operation is Operation.SHIFT and temporal and inside_k:
            raise InputError(
                f"{nest.name}: hardware with temporal bit weights shifts after the loop over K; apply hoist_shift too."
            )
        if step.operation is Operation.REGISTER and not inside_k:
            raise InputError(
                f"{nest.name}: {step.inputs[0]!r} is registered after the loop over K, where the output stage has "
                "cycles of its own; pipeline words inside that loop."
            )
    order = [loop.index for loop in inside if not loop.spatial and loop.index in ("bw", "kt")]
    if order[:1] == ["kt"] and "bw" in order:
        raise InputError(f"{nest.name}: hardware goes through K once per bit weight; apply `reorder kt bw`.")
    known = {"os": ("kt", "kb", "bw", "lane"), "matrix2d": ("kt", "kb", "bw", "lane")}.get(
        engine.dataflow, ("kt", "kb", "kp", "bw")
    )
    for loop in inside:
        if loop.dimension in ("K", "BW") and loop.index not in known:
            raise InputError(
                f"{nest.name}: hardware has no place for the loop {loop.index!r}; it knows {', '.join(known)}."
            )
        if loop.dimension == "K" and not loop.spatial and not loop.sparse and loop.index != "kt":
            raise InputError(f"{nest.name}: loop {loop.index!r} is temporal inside an element; unroll it.")
    if engine.dataflow == "ws" and engine.passes > 1 and not engine.shares_encoders:
        raise InputError(
            f"{nest.name}: a weight-stationary array that takes one bit weight at a time has its encoders at the edge; "
            "apply hoist_encode too."
        )
