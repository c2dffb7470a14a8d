"""Formal proofs of the processing elements' arithmetic, and that they refute a wrong one."""

import pytest
from amaranth.hdl import signed

from bitwright.core.errors import InputError
from bitwright.engine.formal import formal_equivalence
from bitwright.engine.rtl import Arithmetic
from bitwright.engine.tensor_engine import TensorEngine

ELEMENTS = [(), ("opt1",)]


@pytest.mark.parametrize("element", ELEMENTS)
def test_pieces_at_full_width(element):
    report = formal_equivalence(TensorEngine(2, 2, element))
    assert report.passed, report.refuted
    expected = {"digits", *(f"multiple_{row}" for row in range(1, 5))}
    compressed = {f"full_adders_{row}" for row in range(1, 5)}
    accumulate = {"full_adders_1", "full_adders_2", "addition_1", "addition_2"}
    assert set(report.proved) == expected | (compressed if element == ("opt1",) else accumulate)


@pytest.mark.parametrize("element", ELEMENTS)
def test_whole_at_small_width(element):
    report = formal_equivalence(TensorEngine(2, 2, element, a_bits=4, b_bits=4, accumulator_bits=10), whole=True)
    assert report.passed
    assert "whole" in report.proved


def test_opaque_product_is_proved_whole():
    assert formal_equivalence(TensorEngine(2, 2, multiplier="tool")).proved == ("whole",)


def test_a_wrong_full_adder_is_refuted(monkeypatch):
    right = Arithmetic.full_adders

    def wrong(self, words, bits):
        total, carry = right(self, words, bits)
        return total, self._word("wrong", signed(bits), carry & ~2)

    monkeypatch.setattr(Arithmetic, "full_adders", wrong)
    report = formal_equivalence(TensorEngine(2, 2, ("opt1",)))
    assert not report.passed
    assert all(name.startswith("full_adders") for name in report.refuted)


@pytest.mark.parametrize(
    "engine",
    [
        TensorEngine(2, 2, ("opt1", "sign_free", "pipeline pp"), encoding="ent"),
        TensorEngine(2, 2, ("opt2", "hoist_encode", "sign_free")),
        TensorEngine(2, 2, ("opt1",), encoding="csd"),
        TensorEngine(2, 2, ("opt1",), dataflow="cube", depth=4),
        TensorEngine(1, 2, ("opt1", "hoist_encode"), dataflow="tree", depth=2),
    ],
    ids=lambda engine: f"{engine.dataflow}-{engine.encoding}-{'-'.join(engine.transformations)}".replace(" ", "_"),
)
def test_pieces_of_other_engines(engine):
    report = formal_equivalence(engine)
    assert report.passed, report.refuted


def test_whole_statement_with_bias():
    engine = TensorEngine(2, 2, ("opt1", "sign_free"), a_bits=4, b_bits=4, accumulator_bits=10)
    assert "whole" in formal_equivalence(engine, whole=True).proved


def test_what_is_not_covered_says_so():
    with pytest.raises(InputError, match="verify it instead"):
        formal_equivalence(TensorEngine(2, 2, ("opt4c",)))
    with pytest.raises(InputError, match="prove the pieces"):
        formal_equivalence(TensorEngine(2, 2, ("opt2",)), whole=True)


def test_a_wrong_multiple_is_refuted(monkeypatch):
    right = Arithmetic._map

    def wrong(self, words, weight, out):
        return right(self, [words[0], words[1] ^ (weight == 3)], weight, out)

    monkeypatch.setattr(Arithmetic, "_map", wrong)
    assert list(formal_equivalence(TensorEngine(2, 2)).refuted) == ["multiple_4"]


@pytest.mark.slow
@pytest.mark.parametrize("element", ELEMENTS)
def test_whole_at_full_width(element):
    """next state == state + a * b modulo 2^32 for all INT8 operands, value of a by value of a: some minutes each."""
    assert "whole" in formal_equivalence(TensorEngine(1, 1, element), whole=True).proved


def test_wide_operands_are_proved_in_pieces_only():
    with pytest.raises(InputError, match="up to 8 bits"):
        formal_equivalence(TensorEngine(1, 1, a_bits=16, b_bits=16), whole=True)
