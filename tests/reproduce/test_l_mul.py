"""Claims of L-Mul: those that need no network or library agree, and the networks' rows are what they are named for."""

import numpy as np
import pytest
import torch
from torch import nn

from bitwright.arithmetic import logarithmic_multiplication as lmul
from bitwright.core.errors import UnknownNameError
from bitwright.core.quantity import Evidence
from bitwright.engine.gate_simulation import simulate
from bitwright.engine.libraries import find_library
from bitwright.engine.standalone_units import logic_gates
from bitwright.reproduce import l_mul, l_mul_gates, l_mul_models
from bitwright.reproduce.catalogue import system
from bitwright.reproduce.claims import Verdict, check


def found(*names):
    return [check(claim) for claim in l_mul.claims() if claim.name.startswith(names)]


def test_every_claim_has_its_own_name():
    claims = l_mul.claims()
    assert len({(claim.name, claim.conditions) for claim in claims}) == len(claims)
    assert all(claim.published.evidence is Evidence.PUBLISHED for claim in claims)
    assert system("l-mul").status == "complete"
    for point in l_mul.ENTRY_POINTS:
        module, _, name = point.rpartition(".")
        assert hasattr(__import__(module, fromlist=[name]), name)


def test_exactness():
    results = found("products equal", "matrix product equal", "adder over")
    assert [result.verdict for result in results] == [Verdict.AGREES] * 5


def test_the_rule_is_not_the_package_again():
    """1.5 * 1.5 in E4M3: 0x3C + 0x3C - 55 is 0x41, 2.25; 2^-6 * 2^-6 vanishes; 448 * 448 saturates."""
    e4m3 = (4, 3, 0x7F)
    assert l_mul.adder_rule(0x3C, 0x3C, *e4m3) == 0x41
    assert l_mul.adder_rule(0x08, 0x88, *e4m3) == 0x80
    assert l_mul.adder_rule(0x7E, 0xFE, *e4m3) == 0xFE


def test_errors_and_energies():
    results = [result for result in found("mean ", "energy saved") if result.verdict is not Verdict.REPORTED]
    assert len(results) == 20 + 10 + 4
    assert {result.verdict for result in results} == {Verdict.AGREES}
    assert all("analytic" in result.ours.source for result in results if "algebraic, 3" in result.conditions)


def test_memory_takes_the_saving_away():
    one, many = (result.ours.value for result in found("energy saved, linear layer")[:2])  # tokens, 32 bits
    assert one < 1
    assert 60 < many < 79


def test_what_is_not_here_is_said():
    (vision,) = found("attention on vision")
    assert vision.verdict is Verdict.UNAVAILABLE
    assert "Vision" in vision.explanation


@pytest.mark.parametrize("fmt", ["e4m3", "e5m2"])
def test_units_of_both_sides(fmt):
    """Every pair of finite codes: L-Mul equals the arithmetic, the checked multiplier the truncated product."""
    assert l_mul_gates.equal_products(fmt).value == 100
    form, cells = lmul.FORMATS[fmt], find_library("predictive-28nm")
    good = np.array([code for code in range(256) if code & 0x7F < form.special])
    a, b = np.meshgrid(good, good, indexing="ij")
    netlist = logic_gates(l_mul_gates.checked_multiplier(form), cells).netlist(cells)
    words = simulate(netlist, {"a": a, "b": b}).outputs["result"]
    exact = lmul.multiply(lmul.values(a, fmt), lmul.values(b, fmt), fmt, "product")
    ulp = np.exp2(np.floor(np.log2(np.maximum(np.abs(exact), 1e-30))) - form.mantissa_bits)
    expected = np.sign(exact) * np.floor(np.abs(exact) / ulp) * ulp
    assert np.array_equal(lmul.values(words.astype(np.int64) & 0xFF, fmt), expected)


def test_a_wrong_unit_is_seen(monkeypatch):
    wrong = l_mul_gates.units("e4m3", "ranges in neither")[1]
    monkeypatch.setattr(l_mul_gates, "logic_gates", lambda unit, cells: logic_gates(wrong, cells))
    assert l_mul_gates.equal_products("e4m3").value < 90


def test_gates_gain_with_the_mantissa():
    ratios = [l_mul_gates.measure(fmt, "ranges in both", "predictive-28nm", "area").value for fmt in ("e4m3", "bf16")]
    assert 1 > ratios[0] > ratios[1]
    assert 0 < l_mul_gates.measure("bf16", "ranges in both", "predictive-28nm", "energy").value < 1


def test_rows_change_what_they_name():
    torch.manual_seed(0)
    network, x = nn.Sequential(nn.Linear(32, 16)), torch.randn(3, 32)
    with torch.no_grad():
        made = l_mul_models.ROWS["L-Mul 3, all"](network)(x).numpy()
        expected = lmul.matmul(x.numpy(), network[0].weight.numpy().T, 3) + network[0].bias.numpy()
        assert np.array_equal(made, expected)
        assert torch.equal(l_mul_models.ROWS["FP32"](network)(x), network(x))
        rounded = [torch.from_numpy(lmul.round_mantissa(each.numpy(), 7)) for each in (x, network[0].weight)]
        close = l_mul_models.ROWS["product 7, all"](network)(x)
        torch.testing.assert_close(close, rounded[0] @ rounded[1].T + network[0].bias)
    with pytest.raises(UnknownNameError, match="row"):
        l_mul_models.language_model("L-Mul 5, all")


def test_digits(monkeypatch, tmp_path):
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    monkeypatch.setenv("BITWRIGHT_CACHE", str(tmp_path))
    ours, peer = (l_mul_models.digits_accuracy(name, seeds=1)["after"] for name in ("L-Mul 3", "e4m3"))
    assert peer > 0.94
    assert ours > peer - 0.01


@pytest.mark.slow
def test_networks_keep_their_order():
    """Wider mantissas lose less, and attention alone loses less than every product."""
    values = {
        (scope, m): l_mul_models.sentences(f"product {m}, {scope}")["cosine"]
        for scope in l_mul_models.SCOPES
        for m in (2, 4, 7)
    }
    for scope in l_mul_models.SCOPES:
        assert values[scope, 2] < values[scope, 4] < values[scope, 7]
    assert values["attention", 2] > values["all", 2]
