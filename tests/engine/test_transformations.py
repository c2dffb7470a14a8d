"""Whatever is applied, in any order: refused with a reason, or a legal, printable, exact nest."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitwright.core.errors import InputError, UnknownNameError
from bitwright.engine.baselines import gemm
from bitwright.engine.evaluate import run
from bitwright.engine.hardware_rules import check_hardware
from bitwright.engine.legality import check
from bitwright.engine.nest import Operation, loops, steps
from bitwright.engine.notation import parse_nest, print_nest
from bitwright.engine.rtl import generate_rtlil
from bitwright.engine.rules import IllegalTransformation
from bitwright.engine.tensor_engine import TensorEngine
from bitwright.engine.transformations import SEQUENCES, TRANSFORMATIONS, apply, named_sequence
from bitwright.engine.verify import verify

ENCODINGS = ["mbe", "ent", "csd", "twos-complement", "sign-magnitude", None]
STARTS = [
    (),
    ("opt1",),
    ("opt2",),
    ("opt3",),
    ("opt4c",),
    ("opt4e",),
    ("retime_add p",),
    ("roll bw", "reorder kt bw"),
    ("opt1", "insert_sparse bw"),
    ("opt1", "split kt 2 kb", "reorder kb np", "unroll kb"),
]


def baseline(dataflow, encoding="mbe", a_bits=8, b_bits=8):
    depth = 1 if dataflow in ("os", "matrix2d") else 2
    return gemm(dataflow, 1 if dataflow in ("ws", "tree") else 2, 2, depth, a_bits, b_bits, 40, encoding)


def exact(nest, a_bits, b_bits, seed):
    rng = np.random.default_rng(seed)
    low_a, low_b = -(1 << (a_bits - 1)), -(1 << (b_bits - 1))
    for m, k, n in ((3, 5, 2), (1, 1, 1)):
        a, b = rng.integers(low_a, -low_a, (m, k)), rng.integers(low_b, -low_b, (k, n))
        np.testing.assert_array_equal(run(nest, a, b), a @ b)
    a, b = np.full((2, 13), low_a), np.full((13, 3), low_b)
    np.testing.assert_array_equal(run(nest, a, b), a @ b)


@st.composite
def line(draw, nest):
    name = draw(st.sampled_from(sorted(TRANSFORMATIONS)))
    index = st.sampled_from([loop.index for loop in loops(nest.body)])
    value = st.sampled_from(sorted(nest.words))
    arguments = {
        "retime_add": (value,),
        "reduce_apart": (value,),
        "pipeline": (value,) * draw(st.integers(1, 2)),
        "unroll": (index,),
        "roll": (index,),
        "insert_sparse": (index,),
        "reorder": (index, index),
        "lanes": (st.sampled_from("23"),),
        "split": (index, st.sampled_from("234"), st.sampled_from(["kb", "kc", "kp", "mc", "nc", "mp", "np", "bw"])),
    }
    return " ".join((name, *(draw(argument) for argument in arguments.get(name, ()))))


@settings(max_examples=250, deadline=None)
@given(st.data())
def test_random_sequences_are_refused_or_exact(data):
    dataflow = data.draw(st.sampled_from(["os", "ws", "cube", "tree", "matrix2d"]))
    encoding = data.draw(st.sampled_from(ENCODINGS))
    bits = data.draw(st.sampled_from([(4, 4), (4, 8), (8, 8)]))
    nest = baseline(dataflow, encoding, *bits)
    try:
        nest = apply(nest, *data.draw(st.sampled_from(STARTS)))
    except InputError:
        return
    for _ in range(data.draw(st.integers(1, 5))):
        try:
            nest = apply(nest, data.draw(line(nest)))
        except InputError:
            continue
        check(nest)
        assert parse_nest(print_nest(nest)) == nest
        exact(nest, *bits, data.draw(st.integers(0, 99)))


@pytest.mark.parametrize("name", SEQUENCES)
@pytest.mark.parametrize("dataflow", ["os", "ws", "cube", "tree", "matrix2d"])
def test_named_sequences_are_their_steps(name, dataflow):
    if name in ("opt3", "opt4c", "opt4e") and dataflow not in ("os", "matrix2d"):
        with pytest.raises(InputError, match="replaces the elements"):
            named_sequence(name, dataflow)
        return
    whole = apply(baseline(dataflow), name)
    step_by_step = apply(baseline(dataflow), *named_sequence(name, dataflow))
    assert whole.body == step_by_step.body
    assert whole.values == step_by_step.values
    assert whole.name == name


def test_what_the_sequences_leave_inside_the_loop_over_k():
    inner = {
        name: [step.operation for step in steps(apply(baseline("os"), name).loop("kt").body)] for name in SEQUENCES
    }
    assert Operation.ADD not in [operation for found in inner.values() for operation in found]
    assert Operation.SHIFT in inner["opt1"]
    assert all(Operation.SHIFT not in inner[name] for name in ("opt2", "opt3", "opt4c", "opt4e"))
    assert apply(baseline("os"), "opt4e").extent("lane") == 4
    assert any(loop.sparse for loop in loops(apply(baseline("os"), "opt3").body))


def test_reduce_apart_leaves_a_pair_behind_the_states():
    nest = apply(baseline("os"), "opt1", "carry_in_negation", "reduce_apart acc_c")
    apart, running = [step for step in steps(nest.body) if step.operation is Operation.HALF_REDUCE]
    assert (apart.inputs, apart.outputs) == (("pp", "pp_inc"), ("acc_s_in", "acc_c_in"))
    assert running.inputs == ("acc_s_in", "acc_c_in", "acc_s", "acc_c")
    exact(nest, 8, 8, 0)


@pytest.mark.parametrize(
    ("sequence", "message"),
    [
        (("pipeline a",), "operand"),
        (("split mt 2 kb",), "start with 'm'"),
        (("split kt 1 kb",), "whole number of 2 to 4096"),
        (("split kt 2 kt",), "already has a loop"),
        (("split kt",), "expected `split INDEX FACTOR NAME`"),
        (("pipeline",), "names of the values"),
        (("retime_add x",), "'x'"),
        (("unroll xy",), "no loop 'xy'"),
    ],
)
def test_bad_arguments(sequence, message):
    with pytest.raises(InputError, match=message):
        apply(baseline("os"), *sequence)


def test_unknown_names():
    with pytest.raises(UnknownNameError, match="retime_add"):
        apply(baseline("os"), "retime_ad p")
    with pytest.raises(UnknownNameError, match="opt4c"):
        named_sequence("opt4", "os")


def test_errors_show_the_nest_before_the_failing_step():
    before = apply(baseline("os"), "retime_add p")
    with pytest.raises(IllegalTransformation) as raised:
        apply(baseline("os"), "retime_add p", "hoist_shift")
    assert "`hoist_shift`" in str(raised.value)
    assert "\n".join(print_nest(before).splitlines()[1:]) in str(raised.value)


@pytest.mark.parametrize(
    ("dataflow", "sequence"),
    [
        ("cube", ("reorder kt kp",)),
        ("cube", ("opt2", "reorder kt kp")),  # the sum along the chain now grows with K
        ("cube", ("reorder mp np", "hoist_encode")),
        ("matrix2d", ("opt1", "sign_free", "insert_sparse bw")),
        ("os", ("retime_add acc", "retime_add p")),
    ],
)
@pytest.mark.parametrize("encoding", ["mbe", "csd"])
def test_moves_off_the_beaten_track(dataflow, sequence, encoding):
    exact(apply(baseline(dataflow, encoding), *sequence), 8, 8, 1)


def built_or_refused(data, verified):
    """A random sequence on a small engine: refused by the notation or the hardware with a reason, or working gates."""
    dataflow = data.draw(st.sampled_from(["os", "ws", "cube", "tree", "matrix2d"]))
    sequence = data.draw(st.sampled_from(STARTS))

    def engine(*more):
        return TensorEngine(
            1 if dataflow in ("ws", "tree") else 2, 2, (*sequence, *more), dataflow,
            1 if dataflow in ("os", "matrix2d") else 2, 4, 4, 24, data.draw(st.sampled_from(["mbe", "csd"])),
        )  # fmt: skip

    try:
        nest = engine().nest
    except InputError:
        return
    for _ in range(data.draw(st.integers(0, 4))):
        step = data.draw(line(nest))
        try:
            nest = apply(nest, step)
        except InputError:
            continue
        sequence = (*sequence, step)
    try:
        made = engine()
        check_hardware(made)
    except InputError:
        return
    if verified:
        assert verify(made, data.draw(st.integers(0, 9)), 40, "amaranth").passed
    else:
        generate_rtlil(made)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_random_sequences_have_hardware_or_a_reason(data):
    built_or_refused(data, verified=False)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(st.data())
def test_random_sequences_work_in_hardware(data):
    built_or_refused(data, verified=True)


@pytest.mark.parametrize(
    ("sequence", "message"),
    [
        (("roll bw", "split mt 2 mb", "reorder mt kt"), "not summed over, so it cannot pass sums"),
        (("split kt 2 kb", "reorder kb np", "reorder kb bw"), "words made in loop 'bw' are read outside it"),
    ],
)
def test_loops_that_must_not_be_exchanged(sequence, message):
    with pytest.raises(IllegalTransformation, match=message):
        apply(baseline("os"), *sequence)
