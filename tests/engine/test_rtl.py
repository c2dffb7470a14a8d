"""Generated hardware of every engine class: its modules, and that it computes, cycle by cycle."""

import re
import shutil

import numpy as np
import pytest

from bitwright.core.errors import InputError
from bitwright.engine.evaluate import run
from bitwright.engine.hardware_rules import check_hardware
from bitwright.engine.libraries import find_library
from bitwright.engine.rtl import Arithmetic, generate, generate_part, generate_rtlil, parts
from bitwright.engine.tensor_engine import TensorEngine
from bitwright.engine.verify import verify, verify_netlist

needs = {
    tool: pytest.mark.skipif(shutil.which(tool) is None, reason=f"{tool} is not installed")
    for tool in ("iverilog", "verilator")
}

CLASSES = [
    ("os", (), {}),
    ("os", (), {"multiplier": "tool"}),
    ("os", ("opt1",), {}),
    ("os", ("opt2",), {}),
    ("os", ("opt1", "sign_free", "pipeline pp"), {"encoding": "ent"}),
    ("os", ("opt2", "hoist_encode", "sign_free"), {}),
    ("os", ("carry_in_negation", "opt1"), {}),
    ("os", ("opt3",), {}),
    ("os", ("opt4c", "sign_free"), {}),
    ("os", ("opt4e",), {"encoding": "ent"}),
    ("os", ("opt4e", "sign_free", "pipeline m"), {}),
    ("os", ("opt4c",), {"a_bits": 4, "accumulator_bits": 20}),
    ("matrix2d", ("opt1",), {}),
    ("matrix2d", ("opt2", "sign_free"), {}),
    ("ws", (), {}),
    ("ws", ("opt1", "sign_free", "hoist_encode"), {}),
    ("ws", ("pipeline p",), {}),
    ("ws", ("opt2", "hoist_encode", "sign_free"), {}),
    ("cube", (), {}),
    ("cube", ("opt1", "sign_free"), {}),
    ("cube", ("opt2",), {}),
    ("tree", (), {}),
    ("tree", ("opt1", "pipeline t"), {}),
    ("tree", ("opt2", "sign_free"), {}),
    ("os", ("opt1",), {"encoding": "csd"}),
    ("os", (), {"a_bits": 4, "b_bits": 4, "encoding": "twos-complement"}),
    ("os", ("opt1", "sign_free", "reduce_apart acc_s", "pipeline acc_s_in"), {}),
    (
        "os",
        ("opt4e", "carry_in_negation", "sign_free", "reduce_apart acc_s", "pipeline m acc_s_in"),
        {"encoding": "ent"},
    ),
]
PYTHON = [0, 2, 3, 8, 14, 18, 22, 27]  # also in Amaranth's simulator, which needs no other tool


def make(case, rows=2, columns=2):
    dataflow, transformations, options = case
    depth = 1 if dataflow in ("os", "matrix2d") else 3
    return TensorEngine(1 if dataflow in ("ws", "tree") else rows, columns, transformations, dataflow, depth, **options)


def name(case):
    return "-".join((case[0], *case[1], *map(str, case[2].values()))).replace(" ", "_")


@pytest.mark.eda
@needs["iverilog"]
@pytest.mark.parametrize("case", CLASSES, ids=name)
def test_every_class_in_icarus(case):
    report = verify(make(case, 3), seed=3, vectors=300, simulator="icarus")
    assert report.passed, report
    assert report.vectors >= 300


@pytest.mark.parametrize("case", [CLASSES[index] for index in PYTHON], ids=name)
def test_some_classes_in_amaranth(case):
    report = verify(make(case), seed=4, vectors=100, simulator="amaranth")
    assert report.passed, report


@pytest.mark.eda
@pytest.mark.slow
@pytest.mark.parametrize(
    "simulator", [pytest.param("icarus", marks=needs["iverilog"]), pytest.param("verilator", marks=needs["verilator"])]
)
@pytest.mark.parametrize("case", CLASSES, ids=name)
def test_8x8_engines(case, simulator):
    report = verify(make(case, 8, 8), vectors=3000, simulator=simulator)
    assert report.passed, report


@pytest.mark.parametrize(
    "case", [("os", (), {}), ("os", ("opt1",), {}), ("os", ("opt4c",), {}), ("ws", (), {}), ("tree", (), {})], ids=name
)
def test_broken_hardware_is_noticed(monkeypatch, case):
    engine = make(case)
    assert verify(engine, vectors=40, simulator="amaranth").passed
    right = Arithmetic.full_adders

    def wrong(self, words, bits):
        total, carry = right(self, words, bits)
        return total, self._word("wrong", carry.shape(), carry & ~(1 << 7))

    monkeypatch.setattr(Arithmetic, "full_adders", wrong)
    report = verify(engine, vectors=40, simulator="amaranth")
    assert not report.passed
    assert "expected" in report.first_mismatch


NETLISTS = [
    ("os", ("opt1", "sign_free"), {}),
    ("os", ("opt2",), {}),
    ("os", ("opt4c",), {}),
    ("cube", (), {}),
    ("ws", ("opt1",), {}),
    ("tree", (), {}),
]


@pytest.mark.parametrize(
    "case",
    [(flow, steps, {**options, "a_bits": 4, "b_bits": 4, "accumulator_bits": 12}) for flow, steps, options in NETLISTS],
    ids=name,
)
def test_gates_after_synthesis(case):
    report = verify_netlist(make(case, 1, 1), find_library("predictive-45nm"), vectors=120)
    assert report.passed, report


def test_modules_and_ports():
    text = generate(TensorEngine(3, 2, ("opt1",)))
    assert set(re.findall(r"^module (\w+)", text, re.M)) == {"output_stage", "pe", "tensor_engine"}
    assert len(re.findall(r"^  pe \w+ \(", text, re.M)) == 6
    assert len(re.findall(r"^  output_stage \w+ \(", text, re.M)) == 2
    assert "src =" not in text  # no paths of this machine
    assert "initial" not in text


def test_the_compressor_has_no_carry_chain():
    assert not re.search(r"[^@(] [+*-] ", generate_part(TensorEngine(2, 2, ("opt1",))))
    assert re.search(r" \+ ", generate_part(TensorEngine(2, 2)))


def test_generation_is_deterministic():
    for case in (CLASSES[2], CLASSES[9]):
        assert generate_rtlil(make(case)) == generate_rtlil(make(case))


def test_parts():
    assert [part.name for part in parts(make(("cube", (), {})))] == ["chain_element", "pe", "output_stage"]
    with pytest.raises(InputError, match="not 'adder'"):
        generate_part(TensorEngine(2, 2), "adder")


@pytest.mark.parametrize(
    ("dataflow", "sequence", "message"),
    [
        ("os", ("roll bw",), "apply hoist_shift too"),
        ("os", ("split kt 2 kb",), "unroll it"),
        ("ws", ("opt2",), "apply hoist_encode too"),
        ("os", ("opt1", "insert_sparse bw"), "not loop 'bw'"),
        ("os", ("reorder mp np",), "mp stands around np"),
        ("cube", ("opt2", "insert_sparse kb"), "of a cube array"),
        ("os", ("opt2", "pipeline acc_weighted"), "after the loop over K"),
    ],
)
def test_nests_without_hardware_are_refused(dataflow, sequence, message):
    engine = make((dataflow, sequence, {}))
    rng = np.random.default_rng(0)
    a, b = rng.integers(-128, 128, (3, 5)), rng.integers(-128, 128, (5, 2))
    np.testing.assert_array_equal(run(engine.nest, a, b), a @ b)  # exact all the same
    with pytest.raises(InputError, match=message):
        check_hardware(engine)


@pytest.mark.parametrize("sequence", [("opt2",), ("opt3",), ("opt4e", "sign_free")])
def test_a_single_bit_weight_cannot_be_taken_one_after_the_other(sequence):
    with pytest.raises(InputError, match="2-bit operands have one digit"):
        check_hardware(TensorEngine(2, 2, sequence, a_bits=2))
