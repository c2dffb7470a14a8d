"""Nests as text: equal after a round trip, errors that name the line."""

import numpy as np
import pytest

from bitwright.core.errors import InputError
from bitwright.engine.baselines import gemm
from bitwright.engine.evaluate import run
from bitwright.engine.legality import check
from bitwright.engine.notation import parse_nest, print_nest
from bitwright.engine.transformations import apply

OPT1 = """\
# a carry-save accumulator, written by hand
nest mine (os, mbe)
operand a: int8
operand b: int8
value d[bw]: int3
value m[bw]: int10
value pp[bw]: int17
state s: int32
state c: int32
value r: int32
result r
for mt in M step 2:
  for nt in N step 2:
    s, c = clear()
    for kt in K:
      par mp in 2:
        par np in 2:
          par bw in 4:
            d = encode(a)   # one digit

            m = map(b, d)
            pp = shift(m)
          s, c = half_reduce(pp[*], s, c)
    par mp in 2:
      par np in 2:
        r = add(s, c)
"""


def test_a_nest_written_by_hand_computes():
    nest = parse_nest(OPT1)
    check(nest, 64)
    rng = np.random.default_rng(0)
    a, b = rng.integers(-128, 128, (5, 9)), rng.integers(-128, 128, (9, 3))
    np.testing.assert_array_equal(run(nest, a, b), a @ b)


@pytest.mark.parametrize("dataflow", ["os", "ws", "cube", "tree", "matrix2d"])
@pytest.mark.parametrize("sequence", [(), ("opt1", "sign_free"), ("opt2",), ("carry_in_negation", "pipeline pp")])
def test_round_trip(dataflow, sequence):
    depth = 1 if dataflow in ("os", "matrix2d") else 2
    nest = apply(gemm(dataflow, 1 if dataflow in ("ws", "tree") else 2, 3, depth), *sequence)
    assert parse_nest(print_nest(nest)) == nest


@pytest.mark.parametrize("encoding", ["mbe", "ent", "csd", "twos-complement", "sign-magnitude", None])
@pytest.mark.parametrize("sequence", [(), ("opt3",), ("opt4c", "sign_free"), ("opt4e",)])
def test_round_trip_of_serial_nests(encoding, sequence):
    if encoding is None and sequence:
        pytest.skip("an opaque product has no digits")
    nest = apply(gemm("os", 2, 2, encoding=encoding), *sequence)
    assert parse_nest(print_nest(nest)) == nest


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("half_reduce(", "reduce(", r"Line 23 .*one of the primitives"),
        ("          s, c = half", "         s, c = half", r"Line 23 .*(indent|loops around)"),
        (
            "      par mp in 2:\n        par np in 2:\n          par bw",
            "        par mp in 2:\n        par np in 2:\n          par bw",
            r"Line 16 .*indentation of 6",
        ),
        ("result r\n", "", "names no result"),
        ("result r\n", "result z\n", "its result 'z'"),
        ("operand b: int8", "operand b: int", r"Line 4 .*declaration"),
        ("value r: int32", "value r: int65", r"Line 10 .*1 to 64 bits"),
        ("(os, mbe)", "(systolic, mbe)", r"Line 2 .*dataflow"),
        ("(os, mbe)", "(os, booth9)", "booth9"),
        ("for kt in K:", "for kt in N:", r"Line 15 .*temporal loop over K"),
        ("par mp in 2:", "par mp in M:", r"Line 16 .*temporal loop"),
        ("par bw in 4:", "par bw in 0:", r"Line 18 .*at least one position"),
        ("par bw in 4:", "par bw in sparse(d) of 4:", r"Line 18 .*temporal loop"),
        ("par bw in 4:", "par xw in 4:", r"Line 18 .*index starting with"),
        ("m = map(b, d)", "m = map b d", r"Line 21 .*a step such as"),
        ("m = map(b, d)", "m = map(b, e)", "'e', which is not declared"),
    ],
)
def test_errors_name_the_line(old, new, message):
    assert old in OPT1
    with pytest.raises(InputError, match=message):
        parse_nest(OPT1.replace(old, new, 1))


def test_empty_text_and_empty_loop():
    with pytest.raises(InputError, match="empty"):
        parse_nest("\n# nothing\n")
    with pytest.raises(InputError, match="'bw' has no body"):
        parse_nest(OPT1[: OPT1.index("            d = ")])
