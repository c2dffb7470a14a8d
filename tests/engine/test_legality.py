"""Each rule of the notation: a move that breaks it, and a nest written by hand that breaks it."""

import numpy as np
import pytest

from bitwright.core.errors import InputError
from bitwright.engine.baselines import gemm
from bitwright.engine.evaluate import run, wrap
from bitwright.engine.legality import (
    RULES,
    IllegalTransformation,
    check,
    check_depth,
    largest_depth,
    latencies,
    stages,
)
from bitwright.engine.notation import parse_nest, print_nest
from bitwright.engine.transformations import apply


def baseline(dataflow="os", **options):
    depth = 1 if dataflow in ("os", "matrix2d") else 2
    return gemm(dataflow, 1 if dataflow in ("ws", "tree") else 2, 2, depth, **options)


@pytest.mark.parametrize(
    ("rule", "dataflow", "sequence"),
    [
        (1, "os", ("unroll kt",)),
        (1, "os", ("reorder np mp",)),
        (1, "os", ("roll bw", "unroll bw")),
        (1, "os", ("split bw 2 bx",)),
        (2, "os", ("hoist_shift",)),
        (2, "os", ("roll bw", "hoist_shift")),
        (2, "os", ("opt2", "hoist_shift")),
        (3, "os", ("retime_add m",)),
        (3, "os", ("pipeline acc",)),
        (3, "tree", ("retime_add pp",)),
        (4, "os", ("insert_sparse np",)),
        (4, "os", ("insert_sparse bw",)),
        (4, "os", ("lanes 4",)),
        (4, "os", ("opt4e", "lanes 2")),
        (4, "os", ("opt3", "reorder kt kb")),
        (4, "os", ("opt1", "insert_sparse bw", "lanes 2")),
        (5, "os", ("hoist_encode", "hoist_encode")),
        (6, "os", ("sign_free", "sign_free")),
    ],
)
def test_illegal_moves_name_their_rule(rule, dataflow, sequence):
    with pytest.raises(IllegalTransformation) as raised:
        apply(baseline(dataflow), *sequence)
    assert raised.value.rule == rule
    assert f"Rule {rule} ({RULES[rule]})" in str(raised.value)
    assert f"`{sequence[-1]}`" in str(raised.value)


def edited(nest, *changes):
    text = print_nest(nest)
    for old, new in changes:
        assert old in text
        text = text.replace(old, new, 1)
    return parse_nest(text)


@pytest.mark.parametrize(
    ("rule", "sequence", "changes", "k"),
    [
        # a multiple read over all bit weights by something that is not a sum
        (
            1,
            (),
            [
                ("value p_s", "value q: int16\nvalue p_s"),
                (
                    "          p_s, p_c = half_reduce(pp[*])",
                    "          q = register(pp[*])\n          p_s, p_c = half_reduce(q, pp[*])",
                ),
            ],
            None,
        ),
        # a word kept once is overwritten by the next bit weight
        (1, (), [("value pp[bw]", "value pp")], None),
        (2, (), [("half_reduce(pp[*])", "half_reduce(m[*])")], None),
        (2, (), [("            pp[bw] = shift(m[bw])", "            pp[bw] = register(m[bw])")], None),
        (2, ("opt2",), [("          acc_weighted = shift(acc_bw)", "          acc_weighted = register(acc_bw)")], None),
        (3, (), [("acc = accumulate(acc, p)", "acc = add(acc, p)")], None),
        (
            3,
            (),
            [
                (
                    "p_s, p_c = half_reduce(pp[*])\n          p =",
                    "p_s, p_c = half_reduce(pp[*])\n          p_s = register(p_s)\n          p =",
                )
            ],
            None,
        ),
        (4, ("opt3",), [("    par mp in 2:\n      sync()\n", "")], None),
        (4, ("opt3",), [("for kb in sparse(d) of 4", "for kb in sparse(m) of 4")], None),
        (
            5,
            (),
            [
                ("        par np in 2:\n          par bw in 4:", "          par bw in 4:"),
                ("            d[bw]", "            d[bw]"),
            ],
            None,
        ),
        (6, (), [("state acc: int32", "state acc: int20")], 100),
        (6, ("opt1",), [("state acc_s: int32", "state acc_s: int31")], None),
    ],
)
def test_nests_written_by_hand(rule, sequence, changes, k):
    nest = apply(baseline(), *sequence)
    check(nest, 64)
    if rule == 5:  # the multiples of b made before the loop over columns
        text = print_nest(nest).splitlines()
        columns = text.index("        par np in 2:")
        nest = parse_nest(
            "\n".join(
                [
                    *text[:columns],
                    *(line[2:] for line in text[columns + 1 : columns + 5]),
                    text[columns],
                    *text[columns + 5 :],
                ]
            )
        )
    else:
        nest = edited(nest, *changes)
    with pytest.raises(IllegalTransformation) as raised:
        check(nest, k)
    assert raised.value.rule == rule, raised.value


def test_words_are_made_before_they_are_read():
    with pytest.raises(InputError, match="reads 'p_s' before it is made"):
        check(edited(baseline(), ("          p_s, p_c = half_reduce(pp[*])\n", "")))
    with pytest.raises(InputError, match="starts with clear"):
        check(edited(baseline(), ("    acc = clear()\n", "")))


def test_pipeline_registers_are_counted():
    nest = apply(baseline(), "pipeline pp", "pipeline p")
    assert (stages(baseline()), stages(nest)) == (0, 2)
    late = latencies(nest)
    assert (late["m"], late["p_s"], late["p_r"]) == (0, 1, 2)
    # Both words of a pair are registered together.
    assert stages(apply(baseline(), "pipeline p_s")) == stages(apply(baseline(), "pipeline p_c")) == 1


def test_a_state_narrower_than_the_result_limits_k():
    """Sixteen bits: 4 * (-2 * -128) = 1024 fits the result, not the state of one bit weight."""
    a, b = np.full((1, 4), -2), np.full((4, 1), -128)
    plain = gemm("os", 1, 1, accumulator_bits=16)
    assert run(plain, a, b) == 1024
    for sequence in ("opt2", "opt3", "opt4e"):
        with pytest.raises(IllegalTransformation, match=r"Rule 6 .*K = 4 need 1.*not even one step of K is safe"):
            run(apply(plain, sequence), a, b)
    with pytest.raises(IllegalTransformation, match="split K: up to 4 is safe"):
        run(apply(gemm("os", 1, 1, accumulator_bits=18), "opt2"), *(np.ones(shape, int) for shape in ((1, 8), (8, 1))))


@pytest.mark.parametrize("sequence", [(), ("opt1",), ("opt2",), ("opt3",), ("opt4e", "sign_free")])
@pytest.mark.parametrize("bits", [16, 17, 20])
def test_the_largest_depth_is_exact_modulo_the_result_and_the_next_one_is_not(sequence, bits):
    nest = apply(gemm("os", 1, 1, accumulator_bits=bits), *sequence)
    deepest = largest_depth(nest, 64)
    for value in (-128, 127, -2, 2, 85, -86) if deepest else ():
        for other in (-128, 127):
            a, b = np.full((1, deepest), value), np.full((deepest, 1), other)
            assert run(nest, a, b) == wrap(a @ b, bits)
    if deepest < 64:
        assert any(nest.words[state.name].bits < bits for state in nest.states)
        with pytest.raises(IllegalTransformation, match="Rule 6"):
            check_depth(nest, deepest + 1)


def test_accumulators_of_32_bits_hold_every_layer():
    for sequence in ("opt1", "opt2", "opt3", "opt4c", "opt4e"):
        assert largest_depth(apply(gemm("os", 1, 1), sequence), 1 << 16) == 1 << 16
