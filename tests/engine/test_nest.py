"""The nest as data: what it prints, and what it refuses."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitwright.core.errors import InputError
from bitwright.engine.nest import Nest, Operation, Step, Value, pretty, reduce_to_two
from bitwright.engine.processing_elements import compressed_accumulation, multiply_accumulate


def test_pretty_shows_where_the_final_addition_stands():
    mac = pretty(multiply_accumulate(4, 3, 8, 8, 32)).splitlines()
    compressed = pretty(compressed_accumulation(4, 3, 8, 8, 32)).splitlines()
    assert mac[0] == "# multiply-accumulate: int8 x int8 -> int32, digits of a: mbe, radix 4"
    assert "          p:16 = add(s, c)" in mac
    assert "    for kt in K:" in compressed
    assert "          s:32, c:32 = half_reduce(pp[*], s, c)" in compressed
    assert compressed[-1] == "        r:32 = add(s, c)"
    assert compressed[-3] == "    par mp in 4:"  # beside, not inside, the loop over K


def test_inner_and_following_bodies():
    nest = compressed_accumulation(4, 3, 8, 8, 32)
    assert [step.operation for step in nest.after_last_step()] == [Operation.ADD]
    assert nest.each_step()[-1].operation is Operation.HALF_REDUCE
    assert multiply_accumulate(4, 3, 8, 8, 32).after_last_step() == ()


@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=12))
def test_reduction_to_two_words_keeps_the_sum(words):
    def full_adder(x, y, z):
        return x ^ y ^ z, (x & y | x & z | y & z) << 1

    pair = reduce_to_two(words, full_adder)
    assert len(pair) <= 2
    assert sum(pair) == sum(words)


def test_undeclared_names_are_refused():
    with pytest.raises(InputError, match="'x', which is not declared"):
        Nest("wrong", (Value("a", 8),), (Step(Operation.ADD, ("a", "x"), ("a",)),), "a")


def test_a_carry_save_pair_is_not_sign_extended():
    values = (Value("a", 8), Value("b", 8), Value("s", 8), Value("c", 8), Value("r", 16))
    body = (Step(Operation.HALF_REDUCE, ("a", "b"), ("s", "c")), Step(Operation.ADD, ("s", "c"), ("r",)))
    with pytest.raises(InputError, match="carry-save pair of 8 bits"):
        Nest("wrong", values, body, "r")


def test_odd_width_for_radix_4():
    with pytest.raises(InputError, match=r"even|odd"):
        multiply_accumulate(4, 4, 7, 8, 32)
