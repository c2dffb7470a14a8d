"""The nest as data: what it finds, walks, and refuses."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitwright.core.errors import InputError
from bitwright.engine.baselines import gemm
from bitwright.engine.nest import Loop, Nest, Operation, Step, Value, loops, placed_steps, reduce_to_two, rewrite, steps
from bitwright.engine.transformations import apply


def test_loops_of_a_baseline():
    nest = gemm("cube", 2, 3, 4)
    assert [loop.index for loop in loops(nest.body)] == ["mt", "nt", "kt", "mp", "np", "kp", "bw"]
    assert (nest.extent("np"), nest.extent("kt"), nest.extent("missing", 7)) == (3, 1, 7)
    assert nest.loop("kt").stride == 4
    assert {value.name for value in nest.states} == {"acc", "t"}
    assert nest.producer("p").operation is Operation.ADD
    for step, outside in placed_steps(nest.body):
        if step.operation is Operation.ENCODE:
            assert [loop.index for loop in outside][-1] == "bw"


def test_the_addition_of_opt1_stands_after_the_loop_over_k():
    nest = apply(gemm("os", 2, 2), "opt1")
    inner = list(steps(nest.loop("kt").body))
    assert all(step.operation not in (Operation.ADD, Operation.ACCUMULATE) for step in inner)
    assert [step.operation for step in steps(nest.body) if step not in inner] == [Operation.CLEAR, Operation.ADD]


def test_rewrite_drops_empty_loops():
    nest = gemm("os", 2, 2)
    body = rewrite(
        nest.body, lambda item: () if isinstance(item, Step) and item.operation is not Operation.CLEAR else (item,)
    )
    assert [loop.index for loop in loops(body)] == ["mt", "nt"]


@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=12))
def test_reduction_to_two_words_keeps_the_sum(words):
    pair = reduce_to_two(words, lambda x, y, z: (x ^ y ^ z, (x & y | x & z | y & z) << 1))
    assert len(pair) <= 2
    assert sum(pair) == sum(words)


def test_what_is_refused():
    with pytest.raises(InputError, match="'x', which is not declared"):
        Nest("wrong", "os", (Value("a", 8),), (Step(Operation.ADD, ("a", "x"), ("a",)),), "a")
    nest = gemm("os", 2, 2)
    with pytest.raises(InputError, match="no loop 'kb'; it has mt, nt, kt"):
        nest.loop("kb")
    with pytest.raises(InputError, match="no step makes 'a'"):
        nest.producer("a")


@pytest.mark.parametrize(
    ("dataflow", "rows", "depth", "message"),
    [
        ("os", 2, 2, "its depth is 1"),
        ("ws", 2, 2, "rows is 1"),
        ("tree", 2, 2, "rows is 1"),
        ("systolic", 2, 1, "dataflow"),
    ],
)
def test_what_dataflows_do_not_have(dataflow, rows, depth, message):
    with pytest.raises(InputError, match=message):
        gemm(dataflow, rows, 2, depth)


def test_odd_width_for_radix_4():
    with pytest.raises(InputError, match="even operand width"):
        gemm("os", 2, 2, a_bits=7)
    assert gemm("os", 2, 2, a_bits=7, encoding="csd").extent("bw") >= 7


def test_loops_compare_by_value():
    assert Loop("kt", "K", None, False, ()) == Loop("kt", "K", None, False, ())
