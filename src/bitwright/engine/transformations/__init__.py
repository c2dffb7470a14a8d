"""Rewrites of loop nests: each a small function that checks that its move is legal and keeps the result exact.

A sequence is written as lines `NAME ARGUMENTS`, as in a study file; `apply` carries it out. OPT1 to OPT4 of the paper
are such sequences (`named_sequence`), derived from every baseline. After each step the widths are fitted again.

Source: arXiv 2503.06342, the transformations of the bit-weight dimension; `carry_in_negation`, `sign_free` and
`reduce_apart` are our additions.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace

from bitwright.core.errors import InputError, UnknownNameError
from bitwright.engine.legality import check, check_rules
from bitwright.engine.nest import Nest
from bitwright.engine.notation import print_nest
from bitwright.engine.rules import IllegalTransformation
from bitwright.engine.transformations.digits import hoist_encode, insert_sparse, lanes
from bitwright.engine.transformations.loops import reorder, roll, split, unroll
from bitwright.engine.transformations.sums import hoist_shift, reduce_apart, retime_add
from bitwright.engine.transformations.words import carry_in_negation, pipeline, sign_free
from bitwright.engine.widths import fit_widths

TRANSFORMATIONS: dict[str, Callable[..., Nest]] = {
    function.__name__: function
    for function in (
        retime_add, split, reorder, unroll, roll, hoist_shift, insert_sparse, hoist_encode, lanes, pipeline,
        carry_in_negation, sign_free, reduce_apart,
    )
}  # fmt: skip

_PARTIAL_SUMS = {"cube": ("p", "t", "acc"), "tree": ("p", "acc")}
_SERIAL_WEIGHTS = ("roll bw", "reorder kt bw", "hoist_shift")
SEQUENCES = ("opt1", "opt2", "opt3", "opt4c", "opt4e")


def named_sequence(name: str, dataflow: str) -> tuple[str, ...]:
    """The transformations that OPT1, OPT2, OPT3, OPT4C and OPT4E of the paper stand for on a dataflow.

    Raises UnknownNameError for other names, InputError for the serial engines (opt3, opt4c, opt4e) on dataflows whose
    operands do not reach a column of elements together (they replace the elements of os and matrix2d).
    """
    if name not in SEQUENCES:
        raise UnknownNameError("sequence of transformations", name, SEQUENCES)
    sequence = tuple(f"retime_add {value}" for value in _PARTIAL_SUMS.get(dataflow, ("p", "acc")))
    level = SEQUENCES.index(name)
    if level >= 1:
        # One pass per bit weight: four operand pairs at a time keep the rate (a tree has them, if four times as deep).
        if dataflow != "tree":
            sequence += ("split kt 4 kb", f"reorder kb {'kp' if dataflow == 'cube' else 'np'}", "unroll kb")
        sequence += _SERIAL_WEIGHTS
    if level >= 2:
        if dataflow not in ("os", "matrix2d"):
            raise InputError(f"{name} replaces the elements of an os or matrix2d array, not of {dataflow!r}.")
        sequence += ("insert_sparse kb",)
    if level >= 3:
        sequence += ("hoist_encode",)
    return (*sequence, "lanes 4") if level >= 4 else sequence


def apply(nest: Nest, *sequence: str) -> Nest:
    """Carry out transformations, each a line `NAME ARGUMENTS` or the name of a sequence (opt1, opt2, ...).

    Raises UnknownNameError for an unknown transformation; IllegalTransformation with the rule, the failing step and the
    nest before it for a move that is not legal.
    """
    label = []
    for line in sequence:
        if line.strip() in SEQUENCES:
            parts: tuple[str, ...] = named_sequence(line.strip(), nest.dataflow)
            label.append(line.strip())
        else:
            parts = (line,)
            label.append(line.strip().replace(" ", "."))
        for part in parts:
            nest = _carry_out(nest, part)
    check(nest)
    return replace(nest, name="+".join(label)) if label else nest


def _carry_out(nest: Nest, line: str) -> Nest:
    name, *arguments = line.split() or [""]
    if name not in TRANSFORMATIONS:
        raise UnknownNameError("transformation", name, (*TRANSFORMATIONS, *SEQUENCES))
    function = TRANSFORMATIONS[name]
    try:
        inspect.signature(function).bind(nest, *arguments)
    except TypeError:
        wanted = " ".join(list(inspect.signature(function).parameters)[1:]).upper()
        raise InputError(f"Transformation {line!r}: expected `{name} {wanted}`.".replace(" `.", "`.")) from None
    try:
        changed = fit_widths(function(nest, *arguments))
        check_rules(changed)
    except IllegalTransformation as error:
        raise IllegalTransformation(error.rule, f"`{line}`: {error.reason}\n{print_nest(nest)}") from None
    except InputError as error:
        error.args = (f"`{line}`: {error}\n{print_nest(nest)}",)
        raise
    return changed
