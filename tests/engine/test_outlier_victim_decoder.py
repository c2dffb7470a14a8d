"""The decoder for every pair of codes and the array on packed pairs, against values worked out without it."""

import shutil

import numpy as np
import pytest

from bitwright.arithmetic.formats.outlier_victim import OutlierVictimPairs
from bitwright.core.errors import InputError
from bitwright.engine.gate_simulation import simulate
from bitwright.engine.libraries import find_library
from bitwright.engine.rtl import outlier_victim_decoder as hardware
from bitwright.engine.standalone_units import integer_multiplier, logic_gates

FORMS = [OutlierVictimPairs(4, "tensor"), OutlierVictimPairs(4, "tensor", normal="flint"),
         OutlierVictimPairs(4, "tensor", bias=3)]  # fmt: skip
TOOLS = [pytest.param(name, marks=[pytest.mark.eda, *[pytest.mark.slow] * (name == "verilator"),
                                   pytest.mark.skipif(shutil.which(tool) is None, reason=f"{tool} is not installed")])
         for name, tool in (("icarus", "iverilog"), ("verilator", "verilator"))]  # fmt: skip


def packed(form, rng, rows, k, spread):
    encoded = form.encode(rng.normal(0, spread, (rows, k)).astype(np.float32), np.ones(1, np.float32))
    return form.pack(encoded)[:-4].reshape(rows, -1)


@pytest.mark.parametrize("simulator", ["amaranth", *TOOLS])
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_the_decoder_for_every_byte(form, simulator):
    found = hardware.verify_decoder(form, simulator)
    assert found.passed, found.first_mismatch
    assert found.cycles == 255


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_expected_words_are_values(form):
    """A word's integer shifted by its exponent is the value that the codec gives."""
    every = np.arange(256)
    codes = np.stack([every & 15, every >> 4], axis=1).astype(np.uint8)
    codes = codes[~(codes == 8).all(axis=1)]
    words = hardware.expected_words(form, codes)
    integer = ((words & 15) ^ 8) - 8
    assert np.array_equal(integer << (words >> 4), form.integers(codes))


@pytest.mark.eda
@pytest.mark.skipif(shutil.which("iverilog") is None, reason="iverilog is not installed")
@pytest.mark.parametrize("exponent", [2, 4])
def test_the_8_bit_decoder_for_every_pair(exponent):
    found = hardware.verify_decoder(OutlierVictimPairs(8, "tensor", exponent_bits=exponent), "icarus")
    assert found.passed, found.first_mismatch
    assert found.cycles > 65000


@pytest.mark.parametrize("simulator", ["amaranth", *TOOLS])
@pytest.mark.parametrize("shape", [(4, 4), (3, 5)])
def test_the_array_on_packed_pairs(shape, simulator):
    form, rng = FORMS[0], np.random.default_rng(0)
    a, b = (np.hstack([packed(form, rng, rows, 32, spread) for spread in (3, 70)]) for rows in shape)
    found = hardware.verify_array(form, a, b, simulator)
    assert found.passed, found.first_mismatch


def test_the_array_on_the_deepest_sum_of_outliers():
    form = FORMS[0]
    row = form.pack(form.encode(np.tile([-96.0, 0.0], 256).astype(np.float32)[None], np.ones(1, np.float32)))[:-4]
    found = hardware.verify_array(form, row[None], row[None])
    assert found.passed


def test_verification_finds_a_wrong_decoder(monkeypatch):
    right = hardware.expected_words
    monkeypatch.setattr(hardware, "expected_words", lambda form, codes: right(form, codes) ^ (codes[:, :1] == 9))
    assert not hardware.verify_decoder(FORMS[0]).passed


@pytest.mark.eda
@pytest.mark.skipif(shutil.which("yosys") is None, reason="yosys is not installed")
def test_mapped_decoders_for_every_byte_and_their_area():
    library = find_library("predictive-28nm")
    every = np.arange(256)
    codes = np.stack([every & 15, every >> 4], axis=1).astype(np.uint8)
    legal = ~(codes == 8).all(axis=1)
    for form in FORMS[:2]:
        gates = hardware.decoder_gates(form, library)
        found = simulate(gates.netlist(library), {"pair": every[None]}).outputs
        words = hardware.expected_words(form, codes[legal])
        assert np.array_equal(found["left"].reshape(-1)[legal], words[:, 0])
        assert np.array_equal(found["right"].reshape(-1)[legal], words[:, 1])
        assert gates.area_um2 < logic_gates(integer_multiplier(4, 4), library).area_um2


def test_bad_input():
    form = FORMS[0]
    good = np.zeros((2, 3), np.uint8)
    for wrong in (lambda: hardware.verify_array(form, good, np.zeros((2, 4), np.uint8)),
                  lambda: hardware.verify_array(form, np.full((2, 3), 0x88, np.uint8), good),
                  lambda: hardware.PairArray(OutlierVictimPairs(8, "tensor"), 2, 2),
                  lambda: hardware.PairArray(form, 2, 2, accumulator_bits=12)):  # fmt: skip
        with pytest.raises(InputError):
            wrong()


def test_unsigned_pairs_have_no_decoder():
    with pytest.raises(InputError, match="signed pairs"):
        hardware.verify_decoder(OutlierVictimPairs(4, "tensor", signed=False))
