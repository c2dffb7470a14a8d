"""Each rule of the notation: a move that breaks it, and a nest written by hand that breaks it."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from bitwright.core.errors import InputError
from bitwright.engine import evaluate
from bitwright.engine.baselines import gemm
from bitwright.engine.evaluate import run, wrap
from bitwright.engine.legality import check, latencies, stages
from bitwright.engine.notation import parse_nest, print_nest
from bitwright.engine.rules import RULES, IllegalTransformation
from bitwright.engine.transformations import apply
from bitwright.engine.widths import check_depth, largest_depth


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
        (1, "os", ("reduce_apart acc",)),
        (1, "os", ("opt1", "reduce_apart acc_s", "reduce_apart acc_c")),
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
        nest = apply(plain, sequence)
        with pytest.raises(IllegalTransformation, match=r"'acc_s' has 10 bits; sums over K = 4 need 12.*up to 1 is"):
            run(nest, a, b)
        assert run(nest, a[:, :1], b[:1]) == 256
    with pytest.raises(IllegalTransformation, match="split K: up to 7 is safe"):
        run(apply(gemm("os", 1, 1, accumulator_bits=18), "opt2"), *(np.ones(shape, int) for shape in ((1, 8), (8, 1))))
    with pytest.raises(IllegalTransformation, match="not even one step of K is safe"):
        run(apply(gemm("os", 1, 1, accumulator_bits=15), "opt2"), a[:, :1], b[:1])


def unchecked(nest, a, b):
    """What the primitives give where `run` refuses."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "check_depth", lambda nest, k: None)
        return run(nest, a, b, modular=True)


@pytest.mark.parametrize("sequence", [("opt2",), ("opt3",), ("opt4c", "carry_in_negation"), ("opt4e", "sign_free")])
def test_refused_depths_are_those_that_go_wrong_by_brute_force(sequence):
    """4-bit operands in 8 bits: every pair of A against every pair of B; the check refuses K = 2 only, and rightly."""
    nest = apply(gemm("os", 1, 1, a_bits=4, b_bits=4, accumulator_bits=8), *sequence)
    assert largest_depth(nest, 64) == 1
    values = np.arange(-8, 8)
    np.testing.assert_array_equal(run(nest, values[:, None], values[None, :]), np.outer(values, values))
    pairs = np.stack(np.meshgrid(values, values), -1).reshape(-1, 2)
    wanted = wrap(pairs @ pairs.T, 8)
    wrong = unchecked(nest, pairs, pairs.T) != wanted
    assert wrong.any()
    with pytest.raises(IllegalTransformation, match="Rule 6"):
        run(nest, pairs, pairs.T, modular=True)
    plain = gemm("os", 1, 1, a_bits=4, b_bits=4, accumulator_bits=8)  # wraps like its result, so nothing is refused
    np.testing.assert_array_equal(run(plain, pairs, pairs.T, modular=True), wanted)


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(["os", "cube", "tree", "matrix2d"]), st.sampled_from(["mbe", "ent", "csd"]),
    st.sampled_from([("opt2",), ("opt2", "sign_free"), ("opt3",), ("opt4c",), ("opt4e", "carry_in_negation")]),
    st.sampled_from([(4, 4), (4, 6), (6, 4)]), st.integers(0, 4),
)  # fmt: skip
def test_accepted_depths_are_exact_and_the_next_is_wrong_for_extreme_operands(dataflow, encoding, sequence, bits, more):
    serial = sequence[0] in ("opt3", "opt4c", "opt4e")
    assume(not serial or dataflow in ("os", "matrix2d"))
    rows, depth = 1 if dataflow == "tree" else 2, 4 if dataflow in ("cube", "tree") else 1
    width = sum(bits) + more
    nest = apply(gemm(dataflow, rows, 2, depth, *bits, width, encoding), *sequence)
    deepest = largest_depth(nest, 64)
    assert deepest < 64
    a = np.arange(-(1 << (bits[0] - 1)), 1 << (bits[0] - 1))[:, None]
    b = np.array([[-(1 << (bits[1] - 1)), (1 << (bits[1] - 1)) - 1]])

    def sums(k):
        return np.repeat(a, k, 1), np.repeat(b, k, 0)

    for k in range(1, deepest + 1):
        left, right = sums(k)
        np.testing.assert_array_equal(run(nest, left, right, modular=True), wrap(left @ right, width))
    left, right = sums(deepest + 1)
    assert (unchecked(nest, left, right) != wrap(left @ right, width)).any()


@pytest.mark.parametrize("sequence", [(), ("opt1",), ("opt2",), ("opt3",), ("opt4e", "sign_free")])
@pytest.mark.parametrize("bits", [16, 17, 20])
def test_the_largest_depth_is_exact_modulo_the_result_and_the_next_one_is_not(sequence, bits):
    nest = apply(gemm("os", 1, 1, accumulator_bits=bits), *sequence)
    deepest = largest_depth(nest, 64)
    for value in (-128, 127, -2, 2, 85, -86) if deepest else ():
        for other in (-128, 127):
            a, b = np.full((1, deepest), value), np.full((deepest, 1), other)
            assert run(nest, a, b, modular=True) == wrap(a @ b, bits)
    if deepest < 64:
        assert any(nest.words[state.name].bits < bits for state in nest.states)
        with pytest.raises(IllegalTransformation, match="Rule 6"):
            check_depth(nest, deepest + 1)


def test_accumulators_of_32_bits_hold_every_layer():
    for sequence in ("opt1", "opt2", "opt3", "opt4c", "opt4e"):
        assert largest_depth(apply(gemm("os", 1, 1), sequence), 1 << 16) == 1 << 16


@pytest.mark.parametrize(
    ("sequence", "changes", "message"),
    [
        ((), [("acc = accumulate(acc, p)", "acc = accumulate(acc, p, p)")], "does not compute A @ B"),
        ((), [("encode(a)", "encode(b)")], "encode takes the operand a"),
        ((), [("map(b, d[bw])", "map(a, d[bw])")], "does not compute A @ B"),
        ((), [("for kt in K:", "for kt in K step 2:")], r"'kt' steps by 2, .* visit 1 position"),
        ((), [("for kt in K:", "for kt in 2:")], r"visits 2 position\(s\) of K only"),
        ((), [("for mt in M step 2:", "for mt in M:")], r"'mp' steps by 1, .*|'mt' steps by 1"),
        ((), [("par np in 2:", "par np in 3:")], "'nt' steps by 2"),
        ((), [("par bw in 4:", "par bw in 3:")], "`bw in 4`; loop 'bw' takes 3"),
        ((), [("par bw in 4:", "par bw in 5:")], "`bw in 4`; loop 'bw' takes 5"),
        ((), [("par bw in 4:", "par bw in 4 step 2:")], "takes 4 steps of 2"),
        ((), [("(os, mbe)", "(os, csd)")], "csd makes 8 digits"),
        ((), [("value p: int16", "value p: int15")], "'p' has 15 bits"),
        ((), [("value m[bw]: int10", "value m[bw]: int9")], r"'m' has 9 bits, -256 to 255; it can become -256 to 256"),
        ((), [("value m[bw]: int10", "value m[bw]: uint10")], "'pp' has 16 bits, .* it can become 0 to 65472"),
        ((), [("value p: int16", "value p: int16\nvalue p: int4")], "declares 'p' twice"),
        ((), [("result acc", "result p")], "does not compute A @ B"),
        ((), [("          acc = accumulate(acc, p)\n", "")], "does not compute A @ B"),
        ((), [("operand a: int8", "operand a: int40")], "signed words of at most 16 bits"),
        ((), [("operand a: int8", "operand a: uint8")], "signed words of at most 16 bits"),
        ((), [("operand b: int8", "state b: int8")], "signed words of at most 16 bits"),
        (("opt1",), [("(pp[*], acc_s, acc_c)", "(pp[*], acc_s, acc_s)")], "a running sum that reads it"),
        (("opt2",), [("par kb in 4:", "par kb in 4 step 2:")], "'kb' steps by 2"),
        (("opt4e",), [("par lane in 4 step 4:", "par lane in 4 step 3:")], "stands for two different|steps by 3"),
    ],
)  # fmt: skip
def test_nests_that_do_not_compute_the_product_are_refused(sequence, changes, message):
    text = print_nest(apply(baseline(), *sequence))
    for old, new in changes:
        assert old in text
        text = text.replace(old, new, 1)
    with pytest.raises(InputError, match=message):
        check(parse_nest(text))


@pytest.mark.parametrize(
    ("old", "new"),
    [("acc = accumulate(acc, p)", "acc = accumulate(acc, p, p)"), ("par bw in 4:", "par bw in 5:"),
     ("operand a: int8", "operand a: int40"), ("for kt in K:", "for kt in 2:")],
)  # fmt: skip
def test_evaluation_refuses_them_too(old, new):
    with pytest.raises(InputError, match=r"does not compute|`bw in 4`|16 bits|of K only"):
        run(edited(baseline(), (old, new)), np.ones((1, 3), int), np.ones((3, 1), int))


def test_sums_that_do_not_fit_the_result_are_refused():
    nest = gemm("os", 2, 2, accumulator_bits=24)
    a, b = np.full((1, 768), -128), np.full((768, 1), -128)
    with pytest.raises(InputError, match="from 12582912 to 12582912 do not fit a result of 24 bits"):
        run(nest, a, b)
    assert run(nest, a, b, modular=True) == 12582912 - (1 << 24)
    assert run(nest, a[:, :511], b[:511]) == 511 << 14  # the largest sum that fits
    with pytest.raises(InputError, match="do not fit"):
        run(nest, a[:, :512], b[:512])


@pytest.mark.parametrize(
    ("rule", "sequence", "changes", "message"),
    [
        (2, (), [("value d[bw]", "state d"), ("value m[bw]", "value m"),
                 ("            m[bw] = map(b, d[bw])\n", ""), ("            pp[bw] = shift(m[bw])\n", ""),
                 ("          p_s, p_c = half_reduce(pp[*])",
                  "          m = map(b, d)\n          p_s, p_c = half_reduce(m)")],
         "map stands outside the loop over bit weights"),
        (2, ("opt2",), [("value acc_bw", "state acc_bw"), ("          acc_weighted = shift(acc_bw)\n", ""),
                        ("          acc = accumulate(acc, acc_weighted)\n",
                         "    par mp in 2:\n      par np in 2:\n        acc_weighted = shift(acc_bw)\n"
                         "        acc = accumulate(acc, acc_weighted)\n")],
         "shift stands outside the loop over bit weights"),
        (2, (), [("            pp[bw] = shift(m[bw])\n", ""), ("half_reduce(pp[*])", "half_reduce(m[*])"),
                 ("          p = add(p_s, p_c)", "          p = shift(p_s, p_c)")], "without its shift"),
        (2, (), [("pp[bw] = shift(m[bw])", "pp[bw] = shift(m[bw])\n            q[bw] = add(pp[bw], m[bw])"),
                 ("value p_s", "value q[bw]: int17\nvalue p_s")], "adds shifted to unshifted words"),
        (4, ("opt3",), [("for kb in sparse(d) of 4", "for kb in sparse(b) of 4")], "no encode makes|no step makes"),
        (4, ("opt3",), [("value d[kb]: int3", "state d: int3")], "holds no digit per 'kb'"),
    ],
)  # fmt: skip
def test_what_stands_in_the_wrong_place_is_named(rule, sequence, changes, message):
    text = print_nest(apply(baseline(), *sequence))
    for old, new in changes:
        assert old in text, text
        text = text.replace(old, new, 1)
    with pytest.raises(InputError, match=message) as raised:
        check(parse_nest(text))
    assert getattr(raised.value, "rule", rule) == rule


@pytest.mark.parametrize(
    ("sequence", "old", "new", "k"),
    [
        (("sign_free",), "state acc: int32", "state acc: int20", 12),  # its bias wraps, and is taken off at 32 bits
        (("opt2",), "value acc_bw: int26", "value acc_bw: int15", 64),
        (("opt2",), "value acc_weighted: int32", "value acc_weighted: int20", 64),
        (("opt4e",), "value acc_bw: int26", "value acc_bw: int17", 256),
    ],
)
def test_words_after_the_sum_over_k_must_hold_it(sequence, old, new, k):
    nest = edited(apply(baseline(), *sequence), (old, new))
    name = new.split()[1].removesuffix(":")
    with pytest.raises(IllegalTransformation, match=rf"'{name}' has \d+ bits, too few for what sums over K = {k}"):
        check(nest, k)
    a, b = np.full((1, k), -128), np.full((k, 1), -128)
    with pytest.raises(IllegalTransformation, match="too few"):
        run(nest, a, b, modular=True)
    deepest = largest_depth(nest, k)
    for value in (-128, 127):  # and as far as it is said to hold, it does
        a, b = np.full((1, deepest), value), np.full((deepest, 1), -128)
        assert run(nest, a, b) == a @ b


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("map(b, d[bw])", "map(d[bw])", "map takes 2 and makes 1 or 2"),
        ("shift(m[bw])", "shift()", "shift takes 1 or 2"),
        ("value p: int16", "value p[zz]: int16", "'p' is kept for each 'zz'"),
        ("value p: int16", "value p[kt]: int16", "'p' is kept for each 'kt'"),
        ("value p: int16", "value p[bw]: int16", "a loop the step is not inside of"),
        ("value m[bw]", "value m[bw, bw]", "names a loop twice"),
        ("state acc: int32", "state acc[bw]: int32", "must be one word"),
        ("operand a: int8", "operand a[bw]: int8", "has no word per 'bw'"),
        ("result acc", "result a", "must be one word that a step makes"),
        ("acc = clear()", "acc, a = clear()", "writes an operand"),
        ("acc = clear()", "acc, p = clear()", "must be declared as a state"),
        ("p = add(p_s, p_c)", "p, p = add(p_s, p_c)", "add takes 1 or more and makes 1"),
        ("p_s, p_c = half_reduce(pp[*])", "p_s, p_s = half_reduce(pp[*])", "makes one word twice"),
        ("acc = accumulate(acc, p)", "acc = register(p)", "a running sum that reads it"),
        ("acc = accumulate(acc, p)", "acc = multiply(acc, p)", "only a running sum does"),
        ("p = add(p_s, p_c)", "p = add(p_s, p_c)\n          p = add(p_s, p_c)", "a second time"),
        ("p = add(p_s, p_c)", "p = register(p_s, p_c)", "one word of each"),
        ("(os, mbe)", "(os)", "names no encoding|over bit weights"),
    ],
)
def test_malformed_steps_are_named(old, new, message):
    with pytest.raises(InputError, match=message):
        check(edited(baseline(), (old, new)))


def test_operands_are_read_inside_the_loops_that_number_them():
    text = print_nest(gemm("os", 2, 2, encoding=None))
    row = "        par np in 2:\n          p = multiply(a, b)\n"
    assert row in text
    moved = text.replace("      par mp in 2:\n", "      p = multiply(a, b)\n      par mp in 2:\n").replace(
        row, "        par np in 2:\n"
    )
    with pytest.raises(IllegalTransformation, match="outside the loop 'mp', but reads a"):
        check(parse_nest(moved))


def test_too_many_positions_at_once_are_refused():
    with pytest.raises(InputError, match="takes 8192 positions of K in one step"):
        apply(gemm("os", 2, 2), "split kt 4096 kb", "split kt 2 kc")
