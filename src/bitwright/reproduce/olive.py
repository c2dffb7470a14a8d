"""System 67: OliVe, outlier-victim pairs (arXiv 2304.07493).

Exactness and statistics are executed, decoders synthesised, machines predicted (`olive_performance`). The networks of
the paper and its data sets are not at hand: their accuracies stay published figures, beside the same comparison on
SmolLM2-135M and MiniLM (`olive_models`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
from numpy.typing import NDArray

from bitwright.arithmetic import formats
from bitwright.arithmetic.formats.outlier_victim import OutlierVictimPairs, pair_statistics
from bitwright.arithmetic.formats.outlier_victim_products import exponent_integer_matmul
from bitwright.core.errors import BitwrightError
from bitwright.core.quantity import Evidence, Quantity
from bitwright.reproduce import olive_digits, olive_models, olive_performance
from bitwright.reproduce.claims import Claim

STATUS = "complete"
ENTRY_POINTS = (
    "bitwright.arithmetic.formats.outlier_victim.OutlierVictimPairs",
    "bitwright.arithmetic.formats.outlier_victim_products.packed_matmul",
    "bitwright.arithmetic.formats.outlier_victim.pair_statistics",
    "bitwright.compression.outlier_victim_pairs.apply",
    "bitwright.engine.rtl.outlier_victim_decoder.verify_array",
)
PAPER = "arXiv 2304.07493"
_REFERENCE = "reference measurement, independent of this package and not of the paper"
_EXACT = f"follows from the encoding of {PAPER}"
LIBRARIES = ("osu018", "predictive-28nm")
PAIR_SHARES = {"BERT-base": (99.12, 0.84, 0.04), "BERT-large": (99.24, 0.71, 0.05), "GPT2-XL": (98.80, 1.14, 0.06),
               "OPT-6.7B": (99.33, 0.64, 0.03)}  # fmt: skip
GLUE = {"CoLA": (59.30, 59.60), "SST-2": (92.43, 93.35), "MNLI": (84.10, 84.94), "QQP": (90.36, 90.91),
        "MRPC": (87.99, 87.75)}  # fmt: skip
SQUAD = {"v1.1 F1": (86.38, 88.28), "v1.1 EM": (78.16, 80.82), "v2.0 F1": (75.90, 77.34), "v2.0 EM": (72.08, 73.60)}
# published perplexity on Wikitext / C4: 4 bits, 8 bits, FP32
PERPLEXITY = {
    ("GPT2-XL", "Wikitext"): (19.11, 17.49, 17.48), ("GPT2-XL", "C4"): (18.08, 16.37, 16.30),
    ("BLOOM-7B1", "Wikitext"): (15.16, 13.13, 13.05), ("BLOOM-7B1", "C4"): (17.18, 15.04, 14.94),
    ("OPT-6.7B", "Wikitext"): (55.44, 22.34, 22.14), ("OPT-6.7B", "C4"): (32.41, 10.73, 10.63),
}  # fmt: skip
MACHINES = (
    ("gpu", "GOBO", 4.5, 4.0), ("gpu", "int8", 2.7, 2.3), ("gpu", "ANT", 2.4, 2.0),
    ("accelerator", "AdaptivFloat", 4.8, 3.7), ("accelerator", "OLAccel", 3.8, 2.1), ("accelerator", "ANT", 3.7, 3.3),
)  # fmt: skip


def published(value: float, unit: str = "", source: str = PAPER) -> Quantity:
    """A figure of the paper."""
    return Quantity(value, unit, Evidence.PUBLISHED, source)


@cache
def _weights() -> tuple[NDArray[np.float32], ...]:
    from torch import nn

    from bitwright.models.load import load

    modules = load("minilm").encoder.modules()
    return tuple(module.weight.detach().numpy() for module in modules if isinstance(module, nn.Linear))


@cache
def _shares() -> tuple[float, ...]:
    pairs = np.array([w.size // 2 for w in _weights()], float)
    rows = [pair_statistics(w) for w in _weights()]
    shares = np.array([(each.normal_normal, each.outlier_normal, each.outlier_outlier) for each in rows])
    return tuple((pairs @ shares / pairs.sum()).tolist())


def outlier_share() -> float:
    """Share of outliers among the weights of MiniLM's linear layers, 0 to 1."""
    return (_shares()[1] / 2 + _shares()[2]) / 100


def relative_error(name: str) -> float:
    """Squared rounding error of all linear weights of MiniLM over their squares."""
    form = formats.parse(name)
    error = sum(np.square(form.decode(form.encode(w)) - w, dtype=np.float64).sum() for w in _weights())
    return float(error / sum(np.square(w, dtype=np.float64).sum() for w in _weights()))


def _victims_pruned() -> float:
    """Relative squared error when only the neighbours of 3-deviation outliers become zero."""
    lost = power = 0.0
    for w in _weights():
        pairs = w.reshape(-1, 2).astype(np.float64)
        far = np.abs(pairs - w.mean()) > 3 * w.std()
        lost += float(np.square(pairs[far[:, ::-1] & ~far]).sum())
        power += float(np.square(pairs).sum())
    return lost / power


def _outliers_clipped() -> float:
    """Relative squared error when only the 3-deviation outliers are cut to 3 deviations."""
    lost = power = 0.0
    for w in _weights():
        reach = 3 * float(w.std())
        lost += float(np.square(w - np.clip(w, w.mean() - reach, w.mean() + reach), dtype=np.float64).sum())
        power += float(np.square(w, dtype=np.float64).sum())
    return lost / power


def _codec(signed: bool = True) -> Quantity:
    """Bytes with the meaning that they must have: one for each of 255, an error for two identifiers."""
    form, right = OutlierVictimPairs(4, "tensor", signed=signed), 0
    illegal = form.identifier * 17
    for byte in range(256):
        codes = np.array([byte & 15, byte >> 4], np.uint8)
        try:
            values = form.integers(codes)
        except BitwrightError:
            right += byte == illegal
            continue
        again = form.encode(values.astype(np.float32), np.ones(1, np.float32))
        right += bool((form.decode(again) == values).all() and byte != illegal)
    return Quantity(100 * right / 256, "%", Evidence.EXECUTED, "decoded, encoded and decoded again")


def _packed_size() -> Quantity:
    form = OutlierVictimPairs(4, "tensor")
    x = np.random.default_rng(0).normal(size=(64, 512)).astype(np.float32)
    return Quantity((form.pack(form.encode(x)).size - 4) / x.size, "B", Evidence.EXECUTED, "one scale of 4 bytes aside")


def _datapath(bits: int) -> Callable[[], Quantity]:
    def measure() -> Quantity:
        form = OutlierVictimPairs(bits, "tensor")
        rng, right = np.random.default_rng(0), 0
        for k in (64, 1024, 4096):
            a, b = (form.encode(rng.normal(0, form.top * 2, (4, k)).astype(np.float32), np.ones(1, np.float32)).codes
                    for _ in range(2))  # fmt: skip
            right += bool((exponent_integer_matmul(form, a, form, b) == form.integers(a) @ form.integers(b).T).all())
        return Quantity(100 * right / 3, "%", Evidence.EXECUTED, "K = 64, 1,024, 4,096")

    return measure


def _accumulator() -> Quantity:
    """K = 4,096 positions, an outlier of 96 times another in every pair."""
    form = OutlierVictimPairs(4, "tensor")
    codes = form.encode(np.tile([96.0, 0.0], 2048).astype(np.float32)[None], np.ones(1, np.float32)).codes
    total = int(exponent_integer_matmul(form, codes, form, codes)[0, 0])
    return Quantity(total.bit_length() + 1, "bit", Evidence.EXECUTED, f"sum {total}; as if no victims existed: 27 bits")


def _rtl() -> Quantity:
    from bitwright.engine.rtl.outlier_victim_decoder import verify_array, verify_decoder

    form, rng = OutlierVictimPairs(4, "tensor"), np.random.default_rng(0)
    results = [verify_decoder(form), verify_decoder(OutlierVictimPairs(4, "tensor", normal="flint"))]
    for spread in (5, 60):
        a, b = (form.pack(form.encode(rng.normal(0, spread, (4, 96)).astype(np.float32), np.ones(1, np.float32)))[:-4]
                for _ in range(2))  # fmt: skip
        results.append(verify_array(form, a.reshape(4, -1), b.reshape(4, -1)))
    return Quantity(
        sum(each.mismatches for each in results), "", Evidence.SIMULATED, "Amaranth; decoder and 4 x 4 array"
    )


def _decoder_area(library: str, bits: int) -> float:
    from bitwright.engine.libraries import find_library
    from bitwright.engine.rtl.outlier_victim_decoder import decoder_gates

    return decoder_gates(OutlierVictimPairs(bits, "tensor"), find_library(library)).area_um2


def _array_overhead(library: str, bits: int) -> Quantity:
    """Area of the border decoders over that of the elements: 64 x 64 of 4 bits, or 32 x 32 of 8."""
    from bitwright.engine.libraries import find_library
    from bitwright.engine.standalone_units import integer_multiplier, product, unit_gates

    unit = product("ovp4") if bits == 4 else integer_multiplier(8, 8)
    element = unit_gates(unit.accumulating(), find_library(library)).area_um2
    side = 256 // bits
    share = 2 * side * _decoder_area(library, bits) / (side * side * element)
    return Quantity(100 * share, "%", Evidence.SYNTHESISED, f"{side} x {side} elements with 32-bit sums, {library}")


def _decoder_claims() -> list[Claim]:
    found = []
    for bits, figure, overhead in ((4, 13.53, 2.2), (8, 18.00, 1.5)):
        for library in LIBRARIES:

            def area(library: str = library, bits: int = bits) -> Quantity:
                return Quantity(_decoder_area(library, bits), "um^2", Evidence.SYNTHESISED, library)

            def share(library: str = library, bits: int = bits) -> Quantity:
                return _array_overhead(library, bits)

            found += [
                Claim(f"{bits}-bit decoder, area", f"{library}; published: 22 nm", published(figure, "um^2"), area,
                      None, "another process; a decoder for both codes of a pair"),
                Claim(f"{bits}-bit decoders of an array over its elements", library, published(overhead, "%"), share,
                      None, "the published shares imply elements of 19 and 75 um^2 at 22 nm; ours hold 32-bit sums"),
            ]  # fmt: skip
    for library in LIBRARIES:

        def beside(library: str = library) -> Quantity:
            from bitwright.engine.libraries import find_library
            from bitwright.engine.standalone_units import integer_multiplier, logic_gates

            bare = logic_gates(integer_multiplier(4, 4), find_library(library)).area_um2
            return Quantity(_decoder_area(library, 4) / bare, "x", Evidence.SYNTHESISED, library)

        found.append(
            Claim("4-bit decoder over a bare 4 x 4 multiplier", library, published(3.0 / 3.8, "x", _REFERENCE), beside,
                  None, "the reference decoder emits wider words; ours is mapped for area")
        )  # fmt: skip

    def die() -> Quantity:
        area = olive_performance.GPU_DECODERS_4BIT * olive_performance.DECODER_4BIT_UM2
        area += olive_performance.GPU_DECODERS_8BIT * olive_performance.DECODER_8BIT_UM2
        share = 100 * area / 1e6 / olive_performance.GPU_DIE_MM2
        return Quantity(share, "%", Evidence.PREDICTED, "published decoder areas and counts")

    found.append(Claim("decoders of an RTX 2080 Ti over its die", "139,264 of 4 bits, 69,632 of 8, 754 mm^2",
                       published(0.42, "%"), die, 0.02))  # fmt: skip
    return found


def _machine_claims() -> list[Claim]:
    found = []
    reasons = {
        ("gpu", "int8"): "4 bits give twice the tensor-core rate of 8 at most, and half the bytes",
        ("gpu", "ANT"): "ANT taken with 8 bits in all layers",
    }  # fmt: skip
    for machine, peer, speed, energy in MACHINES:
        for at, (what, figure, tolerance) in enumerate((("speed", speed, 0.20), ("energy", energy, 0.25))):

            def ours(machine: str = machine, peer: str = peer, at: int = at) -> Quantity:
                value = olive_performance.ratios(machine, peer, outlier_share())[at]
                return Quantity(value, "x", Evidence.PREDICTED, "linear layers of five networks, 2,048 tokens")

            place = "RTX 2080 Ti" if machine == "gpu" else "accelerators of published sizes"
            note = reasons.get((machine, peer), "")
            if (machine, at) == ("accelerator", 1):
                note = "our elements, library and activity; the released simulator's memories"
            # with ANT in 8 bits, its row repeats that of int8
            limit = None if (machine, peer) == ("gpu", "ANT") else tolerance
            found.append(Claim(f"{what} over {peer}", place, published(figure, "x"), ours, limit, note))
    return found


def _network_claims() -> list[Claim]:
    found = []

    def score(recipe: str, over: str | None = None) -> Callable[[], Quantity]:
        def measure() -> Quantity:
            value = olive_models.recipe_perplexity(recipe)
            value /= 1.0 if over is None else olive_models.recipe_perplexity(over)
            return Quantity(value, "" if over is None else "x", Evidence.EXECUTED, f"SmolLM2-135M, {recipe}")

        return measure

    for (network, text), (four, eight, full) in PERPLEXITY.items():
        for bits, figure in (("W4A4", four), ("W8A8", eight)):
            recipe = "W4A4 pairs" if bits == "W4A4" else "W8A8 pairs e4m3"
            found.append(Claim("perplexity over that of FP32", f"{network}, {text}, {bits}",
                               published(figure / full, "x"), score(recipe, "FP32"), None,
                               "ours: SmolLM2-135M, a far smaller network with values of 600 deviations"))  # fmt: skip
    noise = (
        "inputs of 15 to 80 deviations (830 in two layers) under one scale per tensor are rounded at some 30 dB, "
        "whether outliers are coarse or make victims; without gate and up layers, or in blocks of 32, the loss is 1 %"
    )
    for recipe, reason in (
        ("W8A8 pairs e4m3", "the search of the released code ends at 250 %, which makes victims of too many values; "),
        ("W8A8 pairs e4m3, search to 1,000 %", ""),
        ("W8A8 pairs, exponents chosen, search to 1,000 %", "2 to 4 exponent bits of outliers, by error; "),
        ("W8A8 pairs e4m3, search to 1,000 %, gate and up in FP32", ""), ("W8A8 bfp16_32", ""),
    ):  # fmt: skip
        found.append(Claim("perplexity over that of FP32", f"requirement: 8 bits within 1 %; {recipe}",
                           published(1.0, "x", "requirement"), score(recipe, "FP32"), 0.01, reason + noise,
                           "lower"))  # fmt: skip
    for recipe in (*olive_models.RECIPES, *olive_models.BLOCK_FLOATS):
        bits, figure = ("4", 32.41) if recipe.startswith("W4") else ("8", 10.73)
        found.append(
            Claim("perplexity of SmolLM2-135M", f"{recipe}; published: OPT-6.7B, C4, {bits} bits", published(figure),
                  score(recipe), None)
        )  # fmt: skip
    for recipe, (_, _, _, kept) in olive_models.RECIPES.items():
        if kept:
            continue
        for key, name in (("cosine", "mean cosine of embeddings"), ("agreement", "queries with the same passage")):

            def drift(recipe: str = recipe, key: str = key) -> Quantity:
                return Quantity(float(olive_models.drifts()[recipe][key]), "", Evidence.EXECUTED, "MiniLM")

            found.append(Claim(f"{name}, MiniLM", f"{recipe}; 1 is FP32", published(1.0, "", "requirement"), drift,
                               None))  # fmt: skip

    def unavailable() -> Quantity:
        raise BitwrightError("The networks and data sets of GLUE and SQuAD are not at hand; published figures stay.")

    for task, (figure, full) in (GLUE | {f"SQuAD {name}": value for name, value in SQUAD.items()}).items():
        found.append(Claim(f"{task}, BERT-base", f"W4A4; published FP32: {full}", published(figure, "%"), unavailable,
                           None))  # fmt: skip
    return found


def _digits_claims() -> list[Claim]:
    """A network without outliers, for contrast."""

    def score(name: str) -> Callable[[], Quantity]:
        def measure() -> Quantity:
            found = olive_digits.contrast()
            value = found["accuracy"][name] if name in found["accuracy"] else found[name]
            text = f"small vision transformer on 8 x 8 digits, seeds {olive_digits.SEEDS}"
            return Quantity(float(value), "" if name in found["accuracy"] else "sigma", Evidence.EXECUTED, text)

        return measure

    def gain(peer: str) -> Callable[[], Quantity]:
        def measure() -> Quantity:
            found = olive_digits.contrast()["accuracy"]
            return Quantity(100 * (found["pairs"] - found[peer]), "%", Evidence.EXECUTED,
                            f"points of accuracy over int4 {peer}; FP32 {found['FP32']:.4g}")  # fmt: skip

        return measure

    return [
        Claim("largest value of a network without many outliers", f"published: ResNet-18; ours: digits ViT, {what}",
              published(28, "sigma"), score(what), None, "a far smaller network; language models reach hundreds")
        for what in ("largest weight", "largest input")
    ] + [
        Claim("accuracy gained by pairs without outliers", f"digits ViT, W4A4, over int4 {peer}",
              published(0.0, "%", "expected: nothing to save where nothing is far out"), gain(peer), None,
              "450 images, 0.2 points each, three seeds; the first layer's inputs take unsigned pairs")
        for peer in ("clipped", "absmax")
    ]  # fmt: skip


def _statistics_claims() -> list[Claim]:
    found = []
    for at, (what, figure) in enumerate((("neither", 98.61), ("one", 1.37), ("both", 0.026))):

        def share(at: int = at) -> Quantity:
            return Quantity(_shares()[at], "%", Evidence.EXECUTED, "MiniLM")

        where = f"36 linear weights of all-MiniLM-L6-v2, {what} beyond three deviations"
        reference = published(figure, "%", _REFERENCE)
        found.append(Claim("pairs of neighbours", where, reference, share, 0.05 / figure if at < 2 else 0.05))
        for network, shares in PAIR_SHARES.items():
            other = f"{network}, {what} beyond three deviations; ours: MiniLM"
            found.append(Claim("pairs of neighbours, other networks", other, published(shares[at], "%"), share, None))

    def largest() -> Quantity:
        return Quantity(max(pair_statistics(w).largest_sigma for w in _weights()), "sigma", Evidence.EXECUTED, "MiniLM")

    where = "36 linear weights of all-MiniLM-L6-v2"
    found += [
        Claim("largest weight", where, published(175, "sigma", _REFERENCE), largest, 0.01),
        Claim("largest value", "BERT-base, weights and activations (ResNet-18: 28); ours: weights of MiniLM",
              published(325, "sigma"), largest, None),
        Claim("relative squared rounding error", f"{where}, 4 bits, scale search per row",
              published(0.0134, "", _REFERENCE),
              lambda: Quantity(relative_error("ovp4/row"), "", Evidence.EXECUTED), 0.02),
        Claim("error of clipped outliers over that of pruned victims",
              "weights of MiniLM, three deviations; published: MNLI falls from 85 to 35 points against about 0",
              published(50.0, "points"),
              lambda: Quantity(_outliers_clipped() / _victims_pruned(), "x", Evidence.EXECUTED), None),
    ]  # fmt: skip
    return found


def claims() -> tuple[Claim, ...]:
    """Every figure of the paper and every requirement: exactness, statistics, gates, machines, networks."""
    exact = [
        Claim("bytes with one meaning", "4-bit pairs, all 256, two identifiers refused", published(100, "%", _EXACT),
              _codec, 0.0),
        Claim("bytes with one meaning", "unsigned 4-bit pairs, all 256, two identifiers refused",
              published(100, "%", _EXACT), lambda: _codec(signed=False), 0.0),
        Claim("bytes per value", "4-bit pairs, even lengths", published(0.5, "B", _EXACT), _packed_size, 0.0),
        Claim("exponent-integer products equal to integer products", "4-bit pairs", published(100, "%", _EXACT),
              _datapath(4), 0.0),
        Claim("exponent-integer products equal to integer products", "8-bit pairs as four products of 4 bits",
              published(100, "%", _EXACT), _datapath(8), 0.0),
        Claim("accumulator of K = 4,096 outliers", "4-bit pairs; 27 bits if no value had a victim",
              published(27, "bit", _EXACT), _accumulator, 0.04, "every second value is a victim, which saves a bit"),
        Claim("wrong outputs of generated hardware", "decoders for all bytes, a 4 x 4 array on packed pairs",
              published(0, "", _EXACT), _rtl, 0.0),
    ]  # fmt: skip
    return (
        *exact, *_statistics_claims(), *_digits_claims(), *_decoder_claims(), *_machine_claims(), *_network_claims()
    )  # fmt: skip
