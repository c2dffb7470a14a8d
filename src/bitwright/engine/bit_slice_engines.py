"""Published bit-slice engines beside OPT3, OPT4C and OPT4E: throughput, area efficiency and energy on real operands.

Cycles are counted on the operands (`bit_slice_cycles`); areas, clocks and powers are published ones, each with its
source. What no source gives is an assumption: its `source` starts with "assumption:" and its evidence is `predicted`.
Without an area there is no area efficiency, without a power no energy: nothing is filled in.

A comparison is of single processing elements (PEs): encoders shared by a column (OPT4C, OPT4E) and encoders at the
memory (Laconic) are left out on both sides, as in the comparison of arXiv 2503.06342 that it redoes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bitwright.core.errors import InputError
from bitwright.core.quantity import Evidence, Quantity, format_value
from bitwright.engine.bit_slice_cycles import (
    BitSliceCycles,
    bitlet_cycles,
    bitwave_cycles,
    laconic_cycles,
    parallel_cycles,
    serial_digit_cycles,
    sibia_cycles,
)

SCALING_RULE = (
    "constant-voltage scaling: area with the square of the feature size, cycle time and energy per cycle with it"
)
UNSCALED = "none: published in this technology"
_PAPER = "arXiv 2503.06342"
_MICRO24 = "Y. Chen et al., BBS, MICRO 2024, arXiv 2409.05227, table V (PE with eight one-bit multipliers)"
_BITWAVE = "M. Shi et al., BitWave, HPCA 2024, arXiv 2507.12444, abstract"
_BITWAVE_PES = "512 PEs of eight multipliers, the BitWave configuration of the BBS simulator (MICRO 2024)"
_ASSUMPTION = "assumption: "
MAC_AREA_UM2 = 246.0  # INT8 multiplier, INT32 accumulator, 28 nm, about 1 GHz
OPT4C_AREA_UM2 = 81.27
OPT3_AREA_UM2 = OPT4C_AREA_UM2 * 26.1 / 14.4
_LACONIC_LANES = 16
_LACONIC_SHRINK = 5.0


@dataclass(frozen=True)
class BitSliceEngine:
    """One PE: how its cycles are counted, and its area, clock, power and technology, each with its source.

    `count` takes A (m, k) and W (k, n), int8. `note` says what the figures cover and leave out.
    """

    name: str
    count: Callable[[ArrayLike, ArrayLike], BitSliceCycles]
    area_um2: Quantity | None
    clock_hz: Quantity
    power_w: Quantity | None
    technology_nm: Quantity
    note: str = ""

    @property
    def figures(self) -> tuple[Quantity, ...]:
        """The figures that are known."""
        return tuple(
            figure for figure in (self.area_um2, self.clock_hz, self.power_w, self.technology_nm) if figure is not None
        )

    @property
    def assumptions(self) -> tuple[str, ...]:
        """What was assumed for lack of a source."""
        return tuple(f.source.removeprefix(_ASSUMPTION) for f in self.figures if f.source.startswith(_ASSUMPTION))


@dataclass(frozen=True)
class Efficiency:
    """Per PE: MAC/s, MAC/s/mm2, J/MAC, and um2 cycles per MAC: the area that is clocked for one of them.

    None where the area or the power is not known.
    """

    throughput: Quantity
    area_efficiency: Quantity | None
    energy: Quantity | None
    clocked_area: Quantity | None


@dataclass(frozen=True)
class BitSliceReport:
    """One engine on given operands: as published, and in the common technology by the rule that `scaling` names."""

    engine: BitSliceEngine
    cycles: BitSliceCycles
    unscaled: Efficiency
    scaled: Efficiency
    scaling: str


@dataclass(frozen=True)
class BitSliceClaim:
    """A published ratio beside ours; `explanation` gives the assumed figures and what the published one would need."""

    name: str
    conditions: str
    published: Quantity
    ours: Quantity | None
    explanation: str


def scale(engine: BitSliceEngine, technology_nm: float) -> BitSliceEngine:
    """The engine in another technology by `SCALING_RULE`; power stays, as the clock grows by what energy shrinks.

    The rule knows neither voltages nor the step to FinFETs: a coarse one, stated wherever its results appear.
    Raises InputError for a feature size that is not positive.
    """
    if not technology_nm > 0:
        raise InputError(f"A technology has a positive feature size in nm, not {technology_nm}.")
    factor = technology_nm / engine.technology_nm.value
    if factor == 1:
        return engine

    def changed(figure: Quantity, by: float) -> Quantity:
        return Quantity(figure.value * by, figure.unit, Evidence.PREDICTED, f"{figure.source}; {SCALING_RULE}")

    return replace(
        engine,
        area_um2=changed(engine.area_um2, factor**2) if engine.area_um2 else None,
        clock_hz=changed(engine.clock_hz, 1 / factor),
        technology_nm=Quantity(technology_nm, "nm", Evidence.PREDICTED, SCALING_RULE),
    )


def compare(
    a: ArrayLike, w: ArrayLike, engines: Sequence[BitSliceEngine] | None = None, technology_nm: float = 28.0
) -> tuple[BitSliceReport, ...]:
    """Every engine (all of `published_engines` by default) on A (m, k) and W (k, n), int8, one row each.

    Rows carry the figures as published and, beside them, scaled to `technology_nm`.
    Raises InputError for operands that are not int8 matrices of matching shapes, and when there is no engine.
    """
    chosen = published_engines() if engines is None else tuple(engines)
    if not chosen:
        raise InputError("There is no engine to compare; leave `engines` out to compare all published ones.")
    reports = []
    for engine in chosen:
        cycles = engine.count(a, w)
        there = scale(engine, technology_nm)
        rule = UNSCALED if there is engine else SCALING_RULE
        reports.append(BitSliceReport(engine, cycles, _efficiency(engine, cycles), _efficiency(there, cycles), rule))
    return tuple(reports)


def published_engines(opt3_area: Quantity | None = None) -> tuple[BitSliceEngine, ...]:
    """MAC, OPT3, OPT4C, OPT4E, Laconic (alone and in a tile), Bitlet, Sibia, BitWave (PE, and share of its chip).

    `opt3_area`, in um2 at 28 nm, replaces the assumed area of the OPT3 PE, which its paper does not give.
    Raises InputError when it is not positive or in another unit.
    """
    if opt3_area is not None and not (opt3_area.unit == "um2" and opt3_area.value > 0):
        raise InputError(f"The area of an OPT3 PE is positive and in um2, not {opt3_area}.")
    smic = _published(28.0, "nm", f"{_PAPER}, SMIC 28 nm, 0.72 V")
    section = f"{_PAPER}, PE section: "
    if opt3_area is None:
        reason = f"{OPT4C_AREA_UM2} um2 of OPT4C times 1.81, the ratio of both in OSU018 gates"
        opt3_area = _assumed(OPT3_AREA_UM2, "um2", reason)
    laconic = BitSliceEngine(
        "Laconic",
        partial(laconic_cycles, lanes=_LACONIC_LANES),
        _assumed(
            _LACONIC_LANES * MAC_AREA_UM2 / _LACONIC_SHRINK,
            "um2",
            f"{_LACONIC_LANES} MACs of {MAC_AREA_UM2:g} um2 divided by {_LACONIC_SHRINK:g}, the factor against a "
            "bit-parallel PE in the abstract of Laconic, ISCA 2019",
        ),
        _published(1e9, "Hz", "example configuration of DNNsim, the simulator of the Laconic group"),
        None,
        _assumed(28.0, "nm", "area taken relative to a 28 nm MAC"),
        "Booth-like encoders at the memory left out; a PE that never waits for others",
    )
    return (
        BitSliceEngine(
            "MAC",
            parallel_cycles,
            _published(MAC_AREA_UM2, "um2", f"{_PAPER}, workload section"),
            _published(1e9, "Hz", f"{section}a parallel MAC gains nothing beyond 1 GHz"),
            None,
            smic,
            "the PE figure of the paper has a MAC of 367 um2 at 1.0 GHz and 707 um2 at 1.5 GHz",
        ),
        BitSliceEngine(
            "OPT3",
            partial(serial_digit_cycles, lanes=1),
            opt3_area,
            _published(2e9, "Hz", f"{section}area efficiency peaks from 2.0 GHz on"),
            None,
            smic,
            "its own sparse encoder included",
        ),
        BitSliceEngine(
            "OPT4C",
            partial(serial_digit_cycles, lanes=1),
            _published(OPT4C_AREA_UM2, "um2", f"{_PAPER}, workload section"),
            _published(2e9, "Hz", f"{section}1.8 GOPS at 2.22 digits per operand"),
            None,
            smic,
            "encoder and sparse encoder, shared by a column, left out",
        ),
        BitSliceEngine(
            "OPT4E",
            partial(serial_digit_cycles, lanes=4),
            _published(
                MAC_AREA_UM2, "um2", f"{_PAPER}, workload section: one group of four takes about the area of a MAC"
            ),
            _published(2e9, "Hz", f"{section}2 GHz"),
            None,
            smic,
            "a group of four lanes; encoders shared by a column left out",
        ),
        laconic,
        replace(
            laconic,
            name="Laconic tile",
            count=partial(laconic_cycles, lanes=_LACONIC_LANES, tile=(16, 16)),
            note="one of 16x16 PEs that wait for each other after every group, as in DNNsim",
        ),
        BitSliceEngine(
            "Bitlet",
            partial(bitlet_cycles, group=64),
            _published(1665.6, "um2", f"{_MICRO24}: 64-to-1 multiplexers included"),
            _published(0.8e9, "Hz", _MICRO24),
            _published(0.57e-3, "W", _MICRO24),
            _published(28.0, "nm", _MICRO24),
            "reimplemented by others for 8 bits; the chip of MICRO 2021 has 1.5 mm2 and 365 mW at 8 bits",
        ),
        BitSliceEngine(
            "Sibia",
            sibia_cycles,
            None,
            _assumed(0.25e9, "Hz", f"the lowest clock of the bit-slice peers in {_PAPER}, 250 MHz to 1 GHz"),
            None,
            _assumed(28.0, "nm", "as the other peers"),
            "no area or power of its own that could be confirmed",
        ),
        BitSliceEngine(
            "BitWave",
            partial(bitwave_cycles, group=8),
            _published(702.4, "um2", _MICRO24),
            _published(0.8e9, "Hz", _MICRO24),
            _published(0.49e-3, "W", _MICRO24),
            _published(28.0, "nm", _MICRO24),
            "reimplemented by others",
        ),
        BitSliceEngine(
            "BitWave chip",
            partial(bitwave_cycles, group=8),
            _published(1.138e6 / 512, "um2", f"{_BITWAVE}: 1.138 mm2; {_BITWAVE_PES}"),
            _assumed(0.25e9, "Hz", f"the lowest clock of the bit-slice peers in {_PAPER}, 250 MHz to 1 GHz"),
            _published(17.56e-3 / 512, "W", f"{_BITWAVE}: 17.56 mW; {_BITWAVE_PES}"),
            _published(16.0, "nm", _BITWAVE),
            "one PE's share of the chip, buffers and control included",
        ),
    )


def normal_operands(m: int, k: int, n: int, seed: int = 0) -> tuple[NDArray[np.int8], NDArray[np.int8]]:
    """A (m, k) and W (k, n), int8, of normal samples; the largest of each mapped to 127.

    Raises InputError for an extent below 1.
    """
    if min(m, k, n) < 1:
        raise InputError(f"Operands have extents of at least 1, not m={m}, k={k}, n={n}.")
    generator = np.random.default_rng(seed)
    codes = []
    for shape in ((m, k), (k, n)):
        samples = generator.normal(0, 1, shape)
        codes.append(np.rint(samples * (127 / np.abs(samples).max())).astype(np.int8))
    return codes[0], codes[1]


def claims_table(seed: int = 0, opt3_area: Quantity | None = None) -> tuple[BitSliceClaim, ...]:
    """The statements of arXiv 2503.06342 about bit-slice engines, published beside ours, on normal INT8 operands.

    Operands are (512, 1024) and (1024, 512), cut out of 1024x1024 samples as in the paper. Energy compares the area
    clocked per multiply-accumulate, as neither OPT4 nor Laconic gives a power of its PE. Nothing is fitted: where the
    ratios differ, the explanation says which area of the peer the published ratio would need.
    """
    a, w = normal_operands(1024, 1024, 1024, seed)
    reports = {r.engine.name: r for r in compare(a[:512], w[:, :512], published_engines(opt3_area))}
    conditions = "normal INT8 operands, largest sample mapped to 127; PE level, 28 nm"
    claims = [
        _area_claim(reports[ours], reports[peer], ratio, f"{conditions}{extra}", where)
        for ours, peer, ratio, extra, where in (
            ("OPT3", "Laconic", 1.0, '; published as "comparable"', "PE comparison"),
            ("OPT3", "Bitlet", 2.12, "", "PE comparison"),
            ("OPT3", "Sibia", 5.28, "", "PE comparison"),
            ("OPT3", "BitWave", 15.2, "", "PE comparison"),
            ("OPT3", "BitWave chip", 15.2, "; share of the chip, scaled from 16 nm", "PE comparison"),
            ("OPT4C", "Laconic", 2.85, "; engine not named in the abstract", "abstract"),
            ("OPT4E", "Laconic", 2.85, "; engine not named in the abstract", "abstract"),
        )
    ]
    for name in ("OPT4C", "OPT4E"):
        claims.append(_energy_claim(reports[name], reports["Laconic"], 12.10, conditions))
    mac = reports["MAC"]
    for name, pieces, ratio in (("OPT4C", 3, 2.7), ("OPT4E", 1, 3.6)):
        claims.append(_equal_area_claim(reports[name], mac, pieces, ratio, conditions))
    return tuple(claims)


def _published(value: float, unit: str, source: str) -> Quantity:
    return Quantity(value, unit, Evidence.PUBLISHED, source)


def _assumed(value: float, unit: str, reason: str) -> Quantity:
    return Quantity(value, unit, Evidence.PREDICTED, _ASSUMPTION + reason)


def _predicted(value: float, unit: str) -> Quantity:
    return Quantity(value, unit, Evidence.PREDICTED)


def _efficiency(engine: BitSliceEngine, cycles: BitSliceCycles) -> Efficiency:
    throughput = engine.clock_hz.value / cycles.cycles_per_mac
    area = engine.area_um2
    return Efficiency(
        _predicted(throughput, "MAC/s"),
        _predicted(throughput / (area.value * 1e-6), "MAC/s/mm2") if area else None,
        _predicted(engine.power_w.value / throughput, "J/MAC") if engine.power_w else None,
        _predicted(area.value * cycles.cycles_per_mac, "um2 cycles") if area else None,
    )


def _assumptions(*reports: BitSliceReport) -> str:
    lines = [f"{r.engine.name}: {text}" for r in reports for text in r.engine.assumptions]
    return f"assumed: {'; '.join(lines)}" if lines else "no figure assumed"


def _needed_area(report: BitSliceReport, efficiency: float) -> str:
    """The PE area that gives a peer this area efficiency in MAC/s/mm2 with the cycles we count."""
    area = report.scaled.throughput.value / efficiency * 1e6
    clock = scale(report.engine, 28.0).clock_hz.value
    return f"the published ratio needs {area:,.0f} um2 per {report.engine.name} PE at {format_value(clock, 'Hz')}"


def _area_claim(ours: BitSliceReport, peer: BitSliceReport, ratio: float, conditions: str, where: str) -> BitSliceClaim:
    mine, theirs = ours.scaled.area_efficiency, peer.scaled.area_efficiency
    if mine is None:
        raise InputError(f"Engine {ours.engine.name!r} has no area, so it has no area efficiency to compare.")
    figures = [_assumptions(ours, peer), _needed_area(peer, mine.value / ratio)]
    if peer.scaling != UNSCALED:
        figures.append(peer.scaling)
    return BitSliceClaim(
        f"area efficiency, {ours.engine.name} / {peer.engine.name}",
        conditions,
        _published(ratio, "x", f"{_PAPER}, {where}"),
        _predicted(mine.value / theirs.value, "x") if theirs else None,
        "; ".join(figures) + ("" if theirs else f"; no confirmed area of {peer.engine.name}"),
    )


def _energy_claim(ours: BitSliceReport, peer: BitSliceReport, ratio: float, conditions: str) -> BitSliceClaim:
    mine, theirs = ours.scaled.clocked_area, peer.scaled.clocked_area
    return BitSliceClaim(
        f"energy efficiency, {ours.engine.name} / {peer.engine.name}",
        conditions,
        _published(ratio, "x", f"{_PAPER}, abstract"),
        _predicted(theirs.value / mine.value, "x") if mine and theirs else None,
        f"ours: area clocked per MAC, equal energy per um2 and cycle; no power published; {_assumptions(ours, peer)}",
    )


def _equal_area_claim(
    ours: BitSliceReport, mac: BitSliceReport, pieces: int, ratio: float, conditions: str
) -> BitSliceClaim:
    found = pieces * ours.scaled.throughput.value / mac.scaled.throughput.value
    ideal = found * ours.cycles.lane_maximum_penalty
    return BitSliceClaim(
        f"throughput of {pieces} {ours.engine.name} / one MAC",
        conditions,
        _published(ratio, "x", f"{_PAPER}, workload section"),
        _predicted(found, "x"),
        f"ours counts groups without a digit and lanes that wait; without them, as published, {ideal:.2f}x",
    )
