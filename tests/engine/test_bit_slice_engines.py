"""Published bit-slice engines: their figures carry sources, and a comparison is what those figures say."""

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

from bitwright.core.errors import InputError
from bitwright.core.quantity import Evidence, Quantity
from bitwright.engine.bit_slice_engines import (
    SCALING_RULE,
    UNSCALED,
    claims_table,
    compare,
    normal_operands,
    published_engines,
    scale,
)


def engine(name):
    return next(e for e in published_engines() if e.name == name)


def test_every_figure_has_a_source_and_assumptions_are_named():
    for each in published_engines():
        for figure in each.figures:
            assert figure.value > 0
            assert figure.source
            assumed = figure.source.startswith("assumption:")
            assert figure.evidence is (Evidence.PREDICTED if assumed else Evidence.PUBLISHED)
        assert len(each.assumptions) == sum(f.source.startswith("assumption:") for f in each.figures)
    assert engine("Laconic").assumptions
    assert not engine("Bitlet").assumptions
    assert engine("Sibia").area_um2 is None


def test_efficiency_follows_from_cycles_area_clock_and_power():
    # 64 weights of 0b101 and one operand row: eight columns, two of them used, so two cycles for eight MACs.
    a, w = np.ones((1, 64), np.int8), np.full((64, 1), 5, np.int8)
    (report,) = compare(a, w, [engine("BitWave")])
    macs_per_s = Fraction(8, 2) * 800_000_000
    assert report.unscaled.throughput.value == pytest.approx(float(macs_per_s))
    assert report.unscaled.area_efficiency.value == pytest.approx(float(macs_per_s) / 702.4e-6)
    assert report.unscaled.energy.value == pytest.approx(0.49e-3 / float(macs_per_s), rel=1e-6, abs=0)
    assert report.unscaled.clocked_area.value == pytest.approx(702.4 / 4)
    assert report.scaling == UNSCALED
    assert report.scaled == report.unscaled


def test_what_is_not_known_stays_unknown():
    a, w = normal_operands(4, 64, 4)
    rows = {r.engine.name: r for r in compare(a, w)}
    assert len(rows) == len(published_engines())
    assert rows["Sibia"].unscaled.area_efficiency is None
    assert rows["Sibia"].unscaled.clocked_area is None
    for name in ("MAC", "OPT3", "OPT4C", "OPT4E", "Laconic", "Sibia"):
        assert rows[name].unscaled.energy is None
    for row in rows.values():
        assert row.unscaled.throughput.evidence is Evidence.PREDICTED


def test_scaling_is_named_and_undone_by_its_inverse():
    chip = engine("BitWave chip")
    there = scale(chip, 32)  # twice the feature size
    assert there.area_um2.value == pytest.approx(4 * chip.area_um2.value)
    assert there.clock_hz.value == pytest.approx(chip.clock_hz.value / 2)
    assert there.power_w == chip.power_w
    for figure in (there.area_um2, there.clock_hz, there.technology_nm):
        assert SCALING_RULE in figure.source
        assert figure.evidence is Evidence.PREDICTED
    assert scale(there, 16).area_um2.value == pytest.approx(chip.area_um2.value)
    assert scale(chip, 16) is chip
    a, w = normal_operands(4, 64, 4)
    (row,) = compare(a, w, [chip], technology_nm=32)
    assert row.scaling == SCALING_RULE
    assert row.unscaled.area_efficiency.value == pytest.approx(8 * row.scaled.area_efficiency.value)
    assert row.scaled.energy.value == pytest.approx(2 * row.unscaled.energy.value, rel=1e-6, abs=0)


def test_claims_print_published_beside_ours():
    claims = {c.name: c for c in claims_table(seed=1)}
    published = {name: claim.published.value for name, claim in claims.items()}
    assert published["area efficiency, OPT3 / Bitlet"] == 2.12
    assert published["area efficiency, OPT3 / Sibia"] == 5.28
    assert published["area efficiency, OPT3 / BitWave"] == 15.2
    assert published["area efficiency, OPT4E / Laconic"] == 2.85
    assert published["energy efficiency, OPT4E / Laconic"] == 12.10
    assert claims["area efficiency, OPT3 / Sibia"].ours is None
    for claim in claims.values():
        assert claim.published.evidence is Evidence.PUBLISHED
        assert "2503.06342" in claim.published.source
        assert claim.ours is None or claim.ours.value > 0
    assert "246 um2 divided by 5" in claims["area efficiency, OPT4E / Laconic"].explanation
    # Digits without waiting reproduce the two equal-area figures of the paper within 5 %.
    for name, figure in (("throughput of 3 OPT4C / one MAC", 2.7), ("throughput of 1 OPT4E / one MAC", 3.6)):
        ideal = float(claims[name].explanation.rsplit(" ", 1)[1].removesuffix("x"))
        assert ideal == pytest.approx(figure, rel=0.05)
        assert claims[name].ours.value < ideal


def test_the_area_that_a_published_ratio_needs_gives_that_ratio():
    claim = next(c for c in claims_table() if c.name == "area efficiency, OPT3 / Bitlet")
    needed = float(claim.explanation.split(" needs ")[1].split(" um2")[0].replace(",", ""))
    bitlet = engine("Bitlet")
    a, w = normal_operands(1024, 1024, 1024)
    opt3, peer = compare(
        a[:512],
        w[:, :512],
        [engine("OPT3"), replace(bitlet, area_um2=Quantity(needed, "um2", Evidence.PREDICTED, "test"))],
    )
    assert opt3.scaled.area_efficiency.value / peer.scaled.area_efficiency.value == pytest.approx(2.12, rel=0.01)


def test_an_own_area_of_opt3_replaces_the_assumed_one():
    area = Quantity(100.0, "um2", Evidence.SYNTHESISED, "own library")
    opt3 = next(e for e in published_engines(area) if e.name == "OPT3")
    assert opt3.area_um2 == area
    assert not opt3.assumptions


def test_normal_operands_are_reproducible_and_fill_the_range():
    a, w = normal_operands(100, 200, 50, seed=3)
    again, _ = normal_operands(100, 200, 50, seed=3)
    assert np.array_equal(a, again)
    assert a.dtype == np.int8
    assert w.shape == (200, 50)
    assert np.abs(a.astype(int)).max() == np.abs(w.astype(int)).max() == 127


def test_bad_input_is_refused():
    a, w = normal_operands(2, 8, 3)
    with pytest.raises(InputError, match="int8"):
        compare(a.astype(float), w)
    with pytest.raises(InputError, match="matrices"):
        compare(a, w.T)
    with pytest.raises(InputError, match="no engine"):
        compare(a, w, [])
    with pytest.raises(InputError, match="feature size"):
        compare(a, w, technology_nm=0)
    with pytest.raises(InputError, match="extents"):
        normal_operands(0, 8, 3)
    for bad in (Quantity(0.0, "um2", Evidence.PREDICTED), Quantity(1.0, "mm2", Evidence.PREDICTED)):
        with pytest.raises(InputError, match="OPT3"):
            published_engines(bad)
