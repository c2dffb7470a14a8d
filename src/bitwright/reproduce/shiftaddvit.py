"""System 54: ShiftAddViT, a mixture of multiplication primitives (arXiv 2306.06446): exactness, gates, conversion.

Energy and latency are in `shiftaddvit_costs`; speed on a processor is measured by benchmarks/shift_and_add.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache as memory
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from bitwright.arithmetic.shift_and_add import masked_sums, shift_matmul
from bitwright.core import cache
from bitwright.core.quantity import Evidence, Quantity
from bitwright.engine.libraries import find_library
from bitwright.engine.mixed_precision_units import accumulating_apart, array_multiplier
from bitwright.engine.standalone_units import integer_multiplier, product, unit_gates
from bitwright.kernels.shift_and_add import matadd, matshift, pack_mask, pack_shifts
from bitwright.models.binary_attention import HashSettings
from bitwright.models.multiplication_conversion import (
    accuracy,
    convert_in_stages,
    measured_latencies,
    mixtures,
    packed,
    shift_share,
)
from bitwright.reproduce.claims import Claim
from bitwright.reproduce.handwritten_digits import TESTED, handwritten_digits
from bitwright.reproduce.shiftaddvit_costs import cost_claims

STATUS = "complete"
ENTRY_POINTS = (
    "bitwright.arithmetic.shift_and_add.shift_matmul",
    "bitwright.arithmetic.shift_and_add.powers_of_two",
    "bitwright.arithmetic.shift_and_add.masked_sums",
    "bitwright.kernels.shift_and_add.matshift",
    "bitwright.kernels.shift_and_add.matadd",
    "bitwright.models.multiplication_primitives.ShiftLinear",
    "bitwright.models.binary_attention.BinaryLinearAttention",
    "bitwright.models.multiplication_primitives.MixtureOfPrimitives",
    "bitwright.models.multiplication_conversion.convert_in_stages",
    "bitwright.models.multiplication_conversion.packed",
    "bitwright.models.multiplication_energy.network_energy",
)
_REFERENCE = "reference mappings with open tools, OSU018, independent of this package and not of the paper"
_ROUNDED = "activations are rounded down to 16.16 bits"
_SAME = "the same layers with weights rebuilt as powers of two"
_EXACT = "follows from the definitions of arXiv 2306.06446"
# area and area efficiency (area x period) over the INT8 multiply-accumulate
GATES = {"int8*shift3": (0.62, 2.2), "int8*mask": (0.52, 4.1)}
LIBRARIES = ("osu018", "predictive-28nm")
SEEDS = (0, 1, 2)
NATIVE = ("additive", "mixture", "shift")  # stages that are also executed with integer shifts and packed codes
HASHING = HashSettings(neighbours=4)  # the released ones, but of 16 tokens 10 + 10 neighbours would overlap
_BUILT = "the reference keeps the accumulator's adder apart from the product on both sides; a tool merges that of INT8"


def element_ratio(name: str, library: str, apart: bool, what: str) -> Quantity:
    """ "area" or "area efficiency" of an element over the INT8 multiply-accumulate built in the same way."""
    cells = find_library(library)
    figures = []
    for unit in (product(name), array_multiplier(8, 8) if apart else integer_multiplier(8, 8)):
        if apart:
            whole = accumulating_apart(unit, cells)
            figures.append((whole.area_um2, whole.period_s))
        else:
            report = unit_gates(unit.accumulating(), cells)
            figures.append((report.area_um2, report.period_s or report.longest_path_s))
    (area, period), (mac_area, mac_period) = figures
    ratio = area / mac_area if what == "area" else mac_area * mac_period / (area * period)
    return Quantity(ratio, "x", Evidence.SYNTHESISED, library)


def exact_primitives() -> tuple[int, int]:
    """Shift products and masked sums, in numpy and native, that equal integer arithmetic, and how many were tried."""
    rng, right = np.random.default_rng(0), 0
    x = rng.integers(-(1 << 31), 1 << 31, (6, 50))
    for power in range(-14, 1):
        exponent, sign = np.full((50, 4), power), rng.integers(-1, 2, (50, 4))
        expected = (x >> -power) @ sign
        right += bool((shift_matmul(x, exponent, sign) == expected).all())
        right += bool((matshift(x, pack_shifts(exponent.T, sign.T)) == expected).all())
    query, key = rng.integers(0, 2, (2, 50, 9))
    v = rng.integers(-(1 << 20), 1 << 20, (50, 5))
    for both in (masked_sums(query, masked_sums(key.T, v)), matadd(pack_mask(query), matadd(pack_mask(key.T), v))):
        right += bool((both == (query @ key.T) @ v).all())  # the linear order, against the quadratic one
    return right, 32


@memory
def conversion(seed: int) -> Mapping[str, float]:
    """Accuracy on 450 handwritten digits of a small vision transformer after every stage of the conversion, and the
    share of tokens that the mixture's routers send to shifting experts ("shift share"); "<stage>, native" with integer
    shifts and packed codes in native code. Executed, cached."""

    def compute() -> dict[str, float]:
        pixels, labels = (torch.from_numpy(each) for each in handwritten_digits(seed))
        images, threads = pixels.reshape(-1, 8, 8), torch.get_num_threads()
        torch.set_num_threads(1)  # layers this small are slower on more, and sums keep their order
        try:
            made = convert_in_stages(images[TESTED:], labels[TESTED:], seed)
            found = {stage: accuracy(model, images[:TESTED], labels[:TESTED]) for stage, model in made.items()}
            share = shift_share(made["mixture"], images[:TESTED])
            for stage in NATIVE:
                found[f"{stage}, native"] = accuracy(packed(made[stage]), images[:TESTED], labels[:TESTED])
            return {**found, "shift share": share}
        finally:
            torch.set_num_threads(threads)

    inputs = {"version": 2, "seed": seed, "torch": torch.__version__}
    found: Mapping[str, float] = cache.get_or_compute("multiplication-conversion", inputs, compute)
    return found


@memory
def variants(seed: int) -> Mapping[str, float]:
    """As `conversion`, of its variants: "hash" (queries and keys hashed), "two powers" (layers that shift only, by sums
    of two powers of two, after attention by the mean), both also ", native", and "measured": mixtures whose routers
    learn with latencies measured here, with "measured shift share" and the share inversely proportional to latency
    ("measured share wanted", mean over the mixtures, tokens alike). Executed, cached."""

    def compute() -> dict[str, float]:
        pixels, labels = (torch.from_numpy(each) for each in handwritten_digits(seed))
        images, threads = pixels.reshape(-1, 8, 8), torch.get_num_threads()
        taught, tested = (images[TESTED:], labels[TESTED:]), (images[:TESTED], labels[:TESTED])
        torch.set_num_threads(1)
        try:
            with TemporaryDirectory() as kept:  # the first stages are shared
                folder = Path(kept)
                hashed = convert_in_stages(
                    *taught, seed, folder=folder, stages=("additive",), quantiser="hash", hashing=HASHING
                )
                powers = convert_in_stages(*taught, seed, folder=folder, stages=("shift",), terms=2)
                of_shape = memory(lambda inputs, outputs: measured_latencies(inputs, outputs, 64 * 16))
                mixed = convert_in_stages(*taught, seed, folder=folder, stages=("mixture",), latencies=of_shape)
            made = {"hash": hashed["additive"], "two powers": powers["shift"], "measured": mixed["mixture"]}
            found = {"multiply": accuracy(hashed["multiply"], *tested)}
            for name, model in made.items():
                found[name] = accuracy(model, *tested)
                found[f"{name}, native"] = accuracy(packed(model), *tested)
            shares = [float(torch.as_tensor(each.shares)[0]) for each in mixtures(mixed["mixture"])]
            wanted = {"measured share wanted": float(np.mean(shares))}
            return {**found, **wanted, "measured shift share": shift_share(mixed["mixture"], tested[0])}
        finally:
            torch.set_num_threads(threads)

    inputs = {"version": 1, "seed": seed, "torch": torch.__version__}
    found: Mapping[str, float] = cache.get_or_compute("multiplication-variants", inputs, compute)
    return found


def _mean(
    figure: Callable[[Mapping[str, float]], float],
    unit: str,
    of: Callable[[int], Mapping[str, float]] = conversion,
) -> Quantity:
    found = [figure(of(seed)) for seed in SEEDS]
    text = ", ".join(f"{value:.4g}" for value in found)
    return Quantity(float(np.mean(found)), unit, Evidence.EXECUTED, f"digits of 8 x 8 pixels, seeds {SEEDS}: {text}")


def conversion_claims() -> list[Claim]:
    """Accuracy lost by each stage, and the balance of the routers."""

    def kept(stage: str) -> Callable[[], Quantity]:
        return lambda: _mean(lambda found: found[stage] / found["multiply"], "x")

    paper = "arXiv 2306.06446, abstract: comparable accuracy, without a figure; read as within 2 %"
    where = "small vision transformer, handwritten digits, mean of three seeds"
    more = "the paper says of shifts in MLPs alone that they lose accuracy; no figure was read"

    def ratio(stage: str, other: str) -> Callable[[], Quantity]:
        return lambda: _mean(lambda found: found[stage] / found[other], "x")

    def published(value: float, unit: str, text: str) -> Quantity:
        return Quantity(value, unit, Evidence.PUBLISHED, text)

    return [
        *(Claim(f"accuracy kept, {stage}", where, published(1.0, "x", paper), kept(stage), 0.02, "", "higher")
          for stage in ("additive", "mixture")),
        Claim("accuracy kept, shift only", where, published(1.0, "x", more), kept("shift"), None, more),
        *(Claim(f"accuracy of integer shifts and packed codes, {stage}", where, published(1.0, "x", _SAME),
                ratio(f"{stage}, native", stage), 0.01, _ROUNDED) for stage in NATIVE),
        Claim("tokens that shift, latencies 6 to 4", where,
              published(60, "%", "inversely proportional to latency: arXiv 2306.06446, balance loss"),
              lambda: _mean(lambda found: 100 * found["shift share"], "%"), 5 / 60),
    ]  # fmt: skip


def variant_claims() -> list[Claim]:
    """Accuracy of hashed queries and keys and of sums of two powers, and routers that learn from measured latencies."""
    where = "small vision transformer, handwritten digits, mean of three seeds"
    comparable = "arXiv 2306.06446, abstract: comparable accuracy, without a figure; read as within 2 %"
    settings = f"{HASHING.bits} bits, {HASHING.supports} supports, {HASHING.neighbours} neighbours of 16 tokens"
    one_power = "of the multiplying network; with one power: accuracy kept, shift only"
    balance = "arXiv 2306.06446, balance loss: tokens inversely proportional to latency"

    def ratio(figure: str, other: str) -> Callable[[], Quantity]:
        return lambda: _mean(lambda found: found[figure] / found[other], "x", variants)

    def published(text: str) -> Quantity:
        return Quantity(1.0, "x", Evidence.PUBLISHED, text)

    def routed() -> Quantity:
        made = ratio("measured shift share", "measured share wanted")()
        found = [variants(seed) for seed in SEEDS]
        text = ", ".join(
            f"{100 * each['measured shift share']:.1f} % of {100 * each['measured share wanted']:.1f} %"
            for each in found
        )
        return Quantity(
            made.value, made.unit, made.evidence, f"{made.source}; tokens that shift, of those wanted: {text}"
        )

    return [
        Claim("accuracy kept, hashed queries and keys", f"{where}, {settings}", published(comparable),
              ratio("hash", "multiply"), 0.02, "", "higher"),
        Claim("accuracy kept, shift only, sums of two powers", where, published(one_power),
              ratio("two powers", "multiply"), None, "no figure was read of the released option for two powers"),
        *(Claim(f"accuracy of integer shifts and packed codes, {name}", where, published(_SAME),
                ratio(f"{name}, native", name), 0.01, _ROUNDED) for name in ("hash", "two powers")),
        Claim("tokens that shift over those wanted, latencies measured", where, published(balance), routed, None,
              "latencies of the processor it is run on, by the shape of a layer; they differ from run to run"),
        Claim("accuracy kept, mixture, latencies measured", where, published(comparable),
              ratio("measured", "multiply"), None, "as above"),
    ]  # fmt: skip


def claims() -> tuple[Claim, ...]:
    """What is exact, elements in gates, the conversion of a small network, energy and latency of the published ones."""

    def exact() -> Quantity:
        right, tried = exact_primitives()
        return Quantity(100 * right / tried, "%", Evidence.EXECUTED, f"{right} of {tried}")

    found = [
        Claim("primitives equal to integer arithmetic",
              "numpy and native, every exponent from -14 to 0, negative inputs, masked sums in linear order",
              Quantity(100, "%", Evidence.PUBLISHED, _EXACT), exact, 0.0),
    ]  # fmt: skip
    found += conversion_claims() + variant_claims() + cost_claims()
    for library in LIBRARIES:
        for name, (area, efficiency) in GATES.items():
            for apart in (True, False):
                for what, figure in (("area", area), ("area efficiency", efficiency)):
                    how = "accumulator's adder apart" if apart else "accumulator merged by the tool"
                    tolerance = 0.2 if library == "osu018" and apart else None
                    found.append(
                        Claim(f"{name} over INT8 multiply-accumulate, {what}", f"32-bit accumulator, {library}, {how}",
                              Quantity(figure, "x", Evidence.PUBLISHED, _REFERENCE),
                              partial(element_ratio, name, library, apart, what), tolerance, _BUILT)
                    )  # fmt: skip
    return tuple(found)
