"""The generated Verilog and the processing element's ports, driven with the operands the array would give it."""

import re

import numpy as np
import pytest

from bitwright.core.errors import InputError
from bitwright.engine.evaluate import operate
from bitwright.engine.rtl import ProcessingElement, generate, generate_processing_element, generate_rtlil, simulate
from bitwright.engine.systolic import SystolicArray

VARIANTS = [("multiply-accumulate", "booth"), ("multiply-accumulate", "tool"), ("compressed-accumulation", "booth")]


def test_modules_and_ports():
    text = generate(SystolicArray(3, 2, "compressed-accumulation"))
    assert re.findall(r"^module (\w+)", text, re.M) == ["output_stage", "pe", "systolic_array"]
    assert len(re.findall(r"^  pe pe_\d_\d ", text, re.M)) == 6
    assert len(re.findall(r"^  output_stage output_\d ", text, re.M)) == 2
    top = text[text.index("module systolic_array") :]
    ports = set(re.search(r"\((.*?)\);", top, re.S)[1].replace(" ", "").split(","))
    assert ports == {
        "clk", "rst", "valid", "last", "ready", "done", "result_valid", "a_0", "a_1", "a_2", "b_0", "b_1", "result_0",
        "result_1",
    }  # fmt: skip
    assert "src =" not in text  # no paths of this machine
    assert "initial" not in text


def test_the_compressor_has_no_carry_chain():
    element = generate_processing_element(SystolicArray(2, 2, "compressed-accumulation"))
    assert not re.search(r"[^@(] [+*-] ", element)
    assert re.search(r" \+ ", generate_processing_element(SystolicArray(2, 2)))


def test_generation_is_deterministic():
    assert generate_rtlil(SystolicArray(2, 2)) == generate_rtlil(SystolicArray(2, 2))


@pytest.mark.parametrize("variant", VARIANTS)
def test_processing_element_follows_its_operand_streams(variant):
    array = SystolicArray(3, 2, variant[0], multiplier=variant[1])
    rng = np.random.default_rng(5)
    a, b = rng.integers(-128, 128, (5, 9)), rng.integers(-128, 128, (9, 4))
    a[0], b[:, 0] = -128, -128
    streams = operate(array, a, b).inputs
    inputs = {port: values[:, 1, 0] for port, values in streams.items()}
    outputs = simulate(ProcessingElement(array), inputs)
    for state in array.nest.states:  # what leaves an element is what the next one south sees
        assert outputs[f"{state.name}_out"].tolist() == streams[f"{state.name}_in"][:, 2, 0].tolist()
    assert outputs["a_out"].tolist() == streams["a_in"][:, 1, 1].tolist()
    assert outputs["b_out"].tolist() == streams["b_in"][:, 2, 0].tolist()


def test_what_has_no_hardware_yet():
    with pytest.raises(InputError, match="encoding 'mbe'"):
        generate(SystolicArray(2, 2, encoding="csd"))
    with pytest.raises(InputError, match="output-stationary"):
        generate(SystolicArray(2, 2, dataflow="ws"))
