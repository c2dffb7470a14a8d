"""The text form of a loop nest: written by `print_nest`, read by `parse_nest`, equal after a round trip.

    nest opt1 (os, mbe)
    operand a: int8
    operand b: int8
    value m[bw]: int10
    state s: int32
    result r
    for kt in K:
      par bw in 4:
        m = map(b, d)
      s, c = half_reduce(m[*], s, c)
    r = add(s, c)

The head line gives the name, the dataflow, and the encoding of `a`, or the product of number-format codes that
`multiply` stands for (nothing for an opaque integer multiplier). A word is `intN` or `uintN`; `[..]` names the loops
that replicate it. `for` is temporal, `par` spatial; `in K step 4` runs over all of a dimension, `in 4` over that many
positions, `in 4 step 8` over positions 8 apart, `in sparse(d) of 4` over those of 4 positions whose digit `d` is not
zero. A loop's dimension is the letter its index starts with (bw: the bit weight). `[*]` and `[bw]` after a name in a
step are for the reader; `#` starts a comment.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from bitwright.arithmetic import encodings
from bitwright.core.errors import InputError
from bitwright.engine.format_products import is_product
from bitwright.engine.nest import DATAFLOWS, Loop, Nest, Operation, Statement, Step, Value

_NAME = r"[A-Za-z_]\w*"
_HEAD = re.compile(r"nest ([\w.+-]+) \((\w+)(?:, ([\w*-]+))?\)")
_DECLARATION = re.compile(rf"(operand|value|state) ({_NAME})(?:\[([\w, ]+)\])?: (u?)int(\d+)")
_LOOP = re.compile(
    rf"(for|par) ({_NAME}) in (?:(?P<all>[MNK])|(?P<extent>\d+)|sparse\((?P<sparse>{_NAME})\) of (?P<of>\d+))"
    r"(?: step (?P<step>\d+))?:"
)
_STEP = re.compile(r"(?:([^=]+?) = )?(\w+)\(([^()]*)\)")
_DIMENSIONS = {"m": "M", "n": "N", "k": "K", "b": "BW", "l": "K"}


def print_nest(nest: Nest) -> str:
    """The nest as text, one line per declaration, loop and primitive."""
    head = ", ".join([nest.dataflow, *filter(None, (nest.encoding, nest.product))])
    lines = [f"nest {nest.name} ({head})"]
    for value in nest.values:
        kind = "state" if value.state else "operand" if value.name in ("a", "b") else "value"
        per = f"[{', '.join(value.per)}]" if value.per else ""
        lines.append(f"{kind} {value.name}{per}: {'' if value.signed else 'u'}int{value.bits}")
    lines.append(f"result {nest.result}")
    return "\n".join(lines + list(print_body(nest, nest.body))) + "\n"


def print_body(
    nest: Nest, body: Sequence[Statement], depth: int = 0, open_loops: tuple[str, ...] = ()
) -> Iterator[str]:
    """The lines of a part of a nest."""
    indent = "  " * depth

    def show(name: str) -> str:
        per = nest.words[name].per
        return f"{name}[{', '.join(index if index in open_loops else '*' for index in per)}]" if per else name

    for statement in body:
        if isinstance(statement, Loop):
            extent = statement.dimension if statement.extent is None else str(statement.extent)
            if statement.sparse:
                extent = f"sparse({statement.sparse}) of {extent}"
            step = f" step {statement.stride}" if statement.stride != 1 else ""
            yield f"{indent}{'par' if statement.spatial else 'for'} {statement.index} in {extent}{step}:"
            yield from print_body(nest, statement.body, depth + 1, (*open_loops, statement.index))
            continue
        outputs = ", ".join(map(show, statement.outputs))
        inputs = ", ".join(map(show, statement.inputs))
        yield f"{indent}{outputs + ' = ' if outputs else ''}{statement.operation}({inputs})"


def parse_nest(text: str) -> Nest:
    """The nest that a text describes. Raises InputError naming the line that cannot be read."""
    lines = [
        (number, line.split("#")[0].rstrip())
        for number, line in enumerate(text.splitlines(), 1)
        if line.split("#")[0].strip()
    ]
    if not lines:
        raise InputError("The nest is empty; the first line reads `nest NAME (DATAFLOW, ENCODING)`.")
    head = _HEAD.fullmatch(lines[0][1].strip())
    if not head or head[2] not in DATAFLOWS:
        raise _error(lines[0], f"`nest NAME (DATAFLOW, ENCODING)` with a dataflow of {', '.join(DATAFLOWS)}")
    product = head[3] if head[3] and is_product(head[3]) else None
    encoding = None if product else head[3]
    radix = int(encodings.get(encoding).radix) if encoding else 2
    values: list[Value] = []
    result = ""
    at = 1
    while at < len(lines):
        line = lines[at][1].strip()
        if line.startswith("result "):
            result = line.removeprefix("result ").strip()
        elif found := _DECLARATION.fullmatch(line):
            kind, name, per, unsigned, bits = found.groups()
            indices = tuple(part.strip() for part in per.split(",")) if per else ()
            if not 1 <= int(bits) <= 64:
                raise _error(lines[at], "a word of 1 to 64 bits")
            values.append(Value(name, int(bits), indices, kind == "state", not unsigned))
        elif line.split()[0] in ("operand", "value", "state"):
            raise _error(lines[at], "a declaration such as `value m[bw]: int10`")
        else:
            break
        at += 1
    if not result:
        raise InputError(f"Nest {head[1]!r} names no result; add a line `result NAME` after the declarations.")
    body, end = _block(lines, at, 0)
    if end < len(lines):
        raise _error(lines[end], "a line indented like the loops around it")
    names = {value.name for value in values}
    if not {"a", "b", result} <= names:
        raise InputError(f"Nest {head[1]!r} must declare the operands a and b and its result {result!r}.")
    return Nest(head[1], head[2], tuple(values), body, result, encoding, radix, product)


def _block(lines: Sequence[tuple[int, str]], at: int, depth: int) -> tuple[tuple[Statement, ...], int]:
    body: list[Statement] = []
    while at < len(lines):
        text = lines[at][1]
        indent = len(text) - len(text.lstrip())
        if indent < 2 * depth:
            break
        if indent > 2 * depth:
            raise _error(lines[at], f"an indentation of {2 * depth} spaces")
        if text.strip().startswith(("for ", "par ")):
            loop = _loop(lines[at])
            inner, at = _block(lines, at + 1, depth + 1)
            if not inner:
                raise InputError(f"Loop {loop.index!r} has no body; indent its steps by two more spaces.")
            body.append(Loop(loop.index, loop.dimension, loop.extent, loop.spatial, inner, loop.stride, loop.sparse))
        else:
            body.append(_step(lines[at]))
            at += 1
    return tuple(body), at


def _loop(line: tuple[int, str]) -> Loop:
    found = _LOOP.fullmatch(line[1].strip())
    if not found or found[2][0] not in _DIMENSIONS:
        raise _error(
            line, "a loop such as `for kt in K step 4:` or `par bw in 4:`, its index starting with m, n, k or b"
        )
    spatial, index, sparse = found[1] == "par", found[2], found["sparse"]
    if sparse and spatial:
        raise _error(line, "a temporal loop (for): one that visits non-zero digits only has no fixed extent")
    dimension = _DIMENSIONS[index[0]]
    if found["all"] and (found["all"] != dimension or spatial):
        raise _error(line, f"a temporal loop over {dimension}, or a number of positions")
    extent = found["extent"] or found["of"]
    if extent == "0" or found["step"] == "0":
        raise _error(line, "at least one position")
    return Loop(index, dimension, int(extent) if extent else None, spatial, (), int(found["step"] or 1), sparse)


def _step(line: tuple[int, str]) -> Step:
    found = _STEP.fullmatch(line[1].strip())
    if not found:
        raise _error(line, "a step such as `s, c = half_reduce(pp[*], s, c)`")
    if found[2] not in Operation.__members__.values():
        raise _error(line, f"one of the primitives {', '.join(Operation)}")
    return Step(Operation(found[2]), _names(found[3]), _names(found[1] or ""))


def _names(text: str) -> tuple[str, ...]:
    plain = re.sub(r"\[[^\]]*\]", "", text)
    return tuple(name.strip() for name in plain.split(",") if name.strip())


def _error(line: tuple[int, str], expected: str) -> InputError:
    return InputError(f"Line {line[0]} of the nest, {line[1].strip()!r}: expected {expected}.")
