"""System 59: L-Mul, multiplication by integer addition (arXiv 2410.00907).

Exactness, errors and energies are here; gates are in `l_mul_gates`, networks in `l_mul_models`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from bitwright.arithmetic import logarithmic_errors as errors
from bitwright.arithmetic import logarithmic_multiplication as lmul
from bitwright.arithmetic.operation_energy import product_energy
from bitwright.core.errors import BitwrightError
from bitwright.core.quantity import Evidence, Quantity
from bitwright.reproduce.claims import Claim
from bitwright.reproduce.l_mul_gates import gate_claims

STATUS = "complete"
ENTRY_POINTS = (
    "bitwright.arithmetic.logarithmic_multiplication.multiply",
    "bitwright.arithmetic.logarithmic_multiplication.matmul",
    "bitwright.arithmetic.logarithmic_errors.error",
    "bitwright.arithmetic.operation_energy.product_energy",
    "bitwright.engine.standalone_units.logarithmic_multiplier",
    "bitwright.models.logarithmic_layers.with_logarithmic_products",
)
_PAPER = "arXiv 2410.00907"
_ABSTRACT = f"{_PAPER}, abstract"
_REFERENCE = "reference measurement, independent of this package and not of the paper"
# Mean absolute relative error by mantissa bits: exact product rounded, adder, adder without constant, algebraic.
ERRORS = {
    2: (0.070, 0.146, 0.069, 0.118), 3: (0.035, 0.058, 0.048, 0.073), 4: (0.018, 0.053, 0.041, 0.070),
    7: (0.0023, 0.027, 0.039, 0.075), 10: (0.0003, 0.027, 0.039, 0.076),
}  # fmt: skip
# Mean error: adder, algebraic.
BIASES = {2: (0.144, 0.083), 3: (0.049, -0.011), 4: (0.049, -0.022), 7: (0.004, -0.063), 10: (0.004, -0.064)}
# Relative root mean square error of dot products of 1,024: adder, exact products rounded.
DOT_PRODUCTS = {2: (0.165, 0.081), 3: (0.064, 0.042), 4: (0.059, 0.020)}
_FORMS: tuple[tuple[str, lmul.Form, lmul.Offset], ...] = (
    ("exact product, rounded", "product", "paper"), ("adder", "adder", "paper"),
    ("adder without the constant", "adder", "none"), ("algebraic", "algebraic", "paper"),
)  # fmt: skip
_SUMMED: tuple[lmul.Form, ...] = ("adder", "product")
DRAM_J_PER_BIT = 20e-12


def _published(value: float, unit: str, source: str = _REFERENCE) -> Quantity:
    return Quantity(value, unit, Evidence.PUBLISHED, source)


def claims() -> tuple[Claim, ...]:
    """Every figure of the abstract and every reference measurement of the technique."""
    return (*_exact_claims(), *_energy_claims(), *_error_claims(), *gate_claims(), *_network_claims())


def adder_rule(x: int, y: int, exponent_bits: int, mantissa_bits: int, special: int) -> int:
    """The product of two FP8 codes by the rule, in Python's integers; finite operands, special as `FloatFormat`."""
    width, lowest = exponent_bits + mantissa_bits, 1 << mantissa_bits
    a, b = (code & ((1 << width) - 1) for code in (x, y))
    bias = (1 << (exponent_bits - 1)) - 1
    total = a + b - ((bias << mantissa_bits) - 1)  # l(m) = m below 4 bits: 2^(m - l) is 1
    if min(a, b) < lowest or total < lowest:
        total = 0
    return ((x ^ y) >> width & 1) << width | min(total, special - 1)


def _exact_claims() -> list[Claim]:
    def pairs(fmt: str) -> Quantity:
        layout = lmul.FORMATS[fmt]
        good = [code for code in range(256) if code & 0x7F < layout.special]
        sizes = layout.exponent_bits, layout.mantissa_bits, layout.special
        expected = lmul.values([[adder_rule(x, y, *sizes) for y in good] for x in good], fmt)
        numbers = lmul.values(good, fmt)
        found = lmul.multiply(numbers[:, None], numbers[None], fmt)
        share = float((found == expected).mean())
        return Quantity(100 * share, "%", Evidence.EXECUTED, f"{found.size} pairs of finite codes")

    def order() -> Quantity:
        rng = np.random.default_rng(0)
        a, b = rng.normal(size=(9, 70)).astype(np.float32), rng.normal(size=(70, 300)).astype(np.float32)
        right = tried = 0
        for mantissa in lmul.MANTISSAS:
            left, other = lmul.round_mantissa(a, mantissa), lmul.round_mantissa(b, mantissa)
            expected = np.zeros((9, 300), np.float32)
            for k in range(70):
                each = lmul.multiply(left[:, k, None], other[None, k], "fp32", offset=lmul.correction(mantissa))
                expected += each.astype(np.float32)
            right += int((lmul.matmul(a, b, mantissa, threads=2) == expected).sum())
            tried += expected.size
        return Quantity(100 * right / tried, "%", Evidence.EXECUTED, f"{right} of {tried} elements")

    def apart(below: bool) -> Quantity:
        fractions = 1 + np.arange(128) / 128
        adder, formula = (
            lmul.multiply(fractions[:, None], fractions[None], "bf16", form) for form in ("adder", "algebraic")
        )
        t = fractions[:, None] + fractions[None] - 2 + lmul.correction(7)
        chosen = (adder / formula)[t <= 1 if below else t <= 2]
        return Quantity(float(chosen.max()), "x", Evidence.EXECUTED, "all pairs of bfloat16 mantissas")

    found = [
        Claim("products equal to the integer rule", f"{fmt}, every pair of finite codes",
              _published(100, "%", "definition of the adder form"), partial(pairs, fmt), 0.0)
        for fmt in ("e4m3", "e5m2")
    ]  # fmt: skip
    return [
        *found,
        Claim("matrix product equal to a loop of products", "m = 2 to 23, float32 sums, k ascending, two threads",
              _published(100, "%", "definition of the product"), order, 0.0),
        Claim("adder over algebraic form, largest", "t = x_m + y_m + 2^-l up to 1",
              _published(1, "x", "2 t / (1 + t)"), lambda: apart(True), 0.0),
        Claim("adder over algebraic form, largest", "t up to 2",
              _published(4 / 3, "x", "2 t / (1 + t)"), lambda: apart(False), 0.005),
    ]  # fmt: skip


def _energy_claims() -> list[Claim]:
    def narrow(bits: int) -> float:
        return product_energy(bits=bits).dot_product_saving

    def percent(saving: Callable[[], float], source: str) -> Callable[[], Quantity]:
        return lambda: Quantity(100 * saving(), "%", Evidence.PREDICTED, source)

    table = "45 nm operation energies"
    with_memory = f"{table}; weights read at {DRAM_J_PER_BIT * 1e12:g} pJ/bit, an assumption"
    found = []
    for published, source, tolerance in ((95.0, _ABSTRACT, 0.03), (97.3, _REFERENCE, 0.0005)):
        found.append(
            Claim("energy saved, element-wise", f"fp32 multiplication to int32 addition, 45 nm; {published:g}",
                  _published(published, "%", source), percent(lambda: product_energy().element_wise_saving, table),
                  tolerance)
        )  # fmt: skip
    for published, source, tolerance in ((80.0, _ABSTRACT, 0.03), (78.3, _REFERENCE, 0.0005)):
        found.append(
            Claim("energy saved, dot product", f"fp32 multiply-accumulate, 45 nm; {published:g}",
                  _published(published, "%", source), percent(lambda: product_energy().dot_product_saving, table),
                  tolerance)
        )  # fmt: skip
    for bits in (16, 8):
        found.append(
            Claim("energy saved, dot product", f"{bits}-bit operands, fp32 sums, 45 nm", _published(80, "%", _ABSTRACT),
                  percent(partial(narrow, bits), table), None,
                  "accuracy is reported for 8-bit mantissas, the published energy for fp32")
        )  # fmt: skip
    for bits, reuse in ((32, 1), (32, 512), (8, 1), (8, 512)):

        def layer(bits: int = bits, reuse: int = reuse) -> float:
            return product_energy(bits=bits, memory_j_per_bit=DRAM_J_PER_BIT, reuse=reuse).layer_saving

        found.append(
            Claim("energy saved, linear layer with its weights from DRAM", f"{bits}-bit operands, {reuse} tokens",
                  _published(80, "%", _ABSTRACT), percent(layer, with_memory), None,
                  "the abstract counts operations alone")
        )  # fmt: skip
    return found


def _error_claims() -> list[Claim]:
    found = []

    def single(mantissa: int, form: lmul.Form, offset: lmul.Offset, bias: bool) -> Quantity:
        report = errors.error(mantissa, form=form, offset=offset)
        value, other = (report.bias, report.mean_absolute) if bias else (report.mean_absolute, report.bias)
        source = f"{'mean absolute' if bias else 'bias'} {other:+.4f}"
        if form != "product" and mantissa <= 8:
            exact = errors.expected_error(mantissa, form, offset)
            source += f"; analytic {exact.bias if bias else exact.mean_absolute:+.4f}"
        return Quantity(value, "", Evidence.EXECUTED, source)

    def claim(name: str, label: str, figure: float, mantissa: int, how: tuple[lmul.Form, lmul.Offset]) -> Claim:
        # the table is rounded to its last digit
        tolerance = max(0.02, (0.00005 if abs(figure) < 0.003 else 0.0005) / abs(figure))
        return Claim(name, f"{label}, {mantissa} mantissa bits, 10^6 pairs of uniform fractions",
                     _published(figure, ""), lambda: single(mantissa, *how, name.startswith("mean error")),
                     tolerance)  # fmt: skip

    for mantissa, row in ERRORS.items():
        for (label, form, offset), figure in zip(_FORMS, row, strict=True):
            found.append(claim("mean absolute relative error of a product", label, figure, mantissa, (form, offset)))
    for mantissa, (adder, algebraic) in BIASES.items():
        found.append(claim("mean error of a product", "adder", adder, mantissa, ("adder", "paper")))
        found.append(claim("mean error of a product", "algebraic", algebraic, mantissa, ("algebraic", "paper")))
    for mantissa, figures in DOT_PRODUCTS.items():
        for label, form, figure in zip(("L-Mul", "rounded products"), _SUMMED, figures, strict=True):

            def dot(mantissa: int = mantissa, form: lmul.Form = form) -> Quantity:
                report = errors.dot_product_error(mantissa, form=form)
                source = f"gain {report.gain:.4f}, without it {report.rms_without_gain:.4f}"
                return Quantity(report.relative_rms, "", Evidence.EXECUTED, source)

            found.append(
                Claim("relative error of dot products, root mean square",
                      f"{label}, {mantissa} mantissa bits, 1,000 pairs of 1,024 normal numbers",
                      _published(figure, ""), dot, None,
                      "the reference does not state its number of vectors nor what it divides by")
            )  # fmt: skip
    return [*found, *_precision_claims()]


def _precision_claims() -> list[Claim]:
    def ratio(bits: int, peer: int, real: bool) -> Quantity:
        from bitwright.reproduce.l_mul_models import operands

        data: errors.Data = operands() if real else "uniform"
        ours, theirs = errors.error(bits, data), errors.error(peer, data, "product")
        return Quantity(ours.mean_absolute / theirs.mean_absolute, "x", Evidence.EXECUTED)

    found = []
    for real in (False, True):
        where = "inputs x weights of SmolLM2-135M" if real else "uniform fractions"
        for bits, peer, name, note in (
            (3, 2, "e5m2", "better claimed: below 1"),
            (4, 3, "e4m3", "single products; the claim is about networks, where a common bias may cancel"),
        ):

            def measure(bits: int = bits, peer: int = peer, real: bool = real) -> Quantity:
                return ratio(bits, peer, real)

            found.append(
                Claim(f"{bits}-bit L-Mul over {name} mantissa, mean error of a product", where,
                      _published(1, "x", _ABSTRACT), measure, None, note)
            )  # fmt: skip
    return found


def _network_claims() -> list[Claim]:
    # heavy imports stay inside: claims are listed without loading a network
    def perplexity(row: str, peer: str = "FP32") -> Callable[[], Quantity]:
        def measure() -> Quantity:
            from bitwright.reproduce.l_mul_models import WINDOW, WINDOWS, language_model

            own, other = language_model(row), language_model(peer)
            source = f"{other:.2f} to {own:.2f}, {WINDOWS} windows of {WINDOW} tokens"
            return Quantity(own / other, "x", Evidence.EXECUTED, source)

        return measure

    def drift(row: str) -> Callable[[], Quantity]:
        def measure() -> Quantity:
            from bitwright.reproduce.l_mul_models import QUERIES, sentences

            found = sentences(row)
            source = f"{QUERIES} queries: same first {found['agreement']:.3f}, recall {found['recall']:.3f}"
            return Quantity(found["cosine"], "", Evidence.EXECUTED, source)

        return measure

    def digits(row: str, peer: str) -> Callable[[], Quantity]:
        def measure() -> Quantity:
            from bitwright.reproduce.l_mul_models import digits_accuracy

            own, other = digits_accuracy(row), digits_accuracy(peer)
            source = (
                f"{100 * own['after']:.2f} % and {100 * other['after']:.2f} % right; before fine-tuning "
                f"{100 * own['before']:.2f} % and {100 * other['before']:.2f} %"
            )
            return Quantity(own["after"] / other["after"], "x", Evidence.EXECUTED, source)

        return measure

    def vision() -> Quantity:
        raise BitwrightError(
            "Vision-language models of 7 B parameters and their task sets are not part of this package."
        )

    small = "SmolLM2-135M; the published models have 2 to 8 B parameters and are judged by task accuracy"
    found = [
        Claim("attention on vision tasks, mean change of accuracy", "no training",
              _published(0.12, "points", f"{_PAPER}, results"), vision, None),
        Claim("perplexity over FP32, gate", "L-Mul in attention, 4-bit mantissa; gate: within 2 %",
              _published(1, "x", f"{_PAPER}, results: -0.07 % accuracy"), perplexity("L-Mul 4, attention"), 0.02,
              "the common bias of the products sharpens the softmax of a small model: "
              "without the constant, and with the algebraic form, less is lost (rows below)"),
        Claim("perplexity over e4m3", "every product, 3-bit mantissa; claimed equal", _published(1, "x", _ABSTRACT),
              perplexity("L-Mul 3, all", "e4m3, all"), None, small),
    ]  # fmt: skip
    for scope in ("attention", "all"):
        rows = [f"{kind} {m}, {scope}" for m in (2, 3, 4, 7) for kind in ("L-Mul", "product")]
        rows += [f"L-Mul 4 without constant, {scope}", f"L-Mul 4 algebraic, {scope}"]
        rows += [f"e4m3, {scope}", f"e5m2, {scope}"] + (["L-Mul 4 calibrated, all"] if scope == "all" else [])
        for row in rows:
            found.append(
                Claim("perplexity over FP32", row, _published(1, "x", f"{_PAPER}, results"), perplexity(row), None,
                      small)
            )  # fmt: skip
            found.append(
                Claim("cosine of sentence embeddings to FP32", f"MiniLM, {row}",
                      _published(1, "", f"{_PAPER}, results"), drift(row), None,
                      "no published figure; 1 is what nearly lossless would mean")
            )  # fmt: skip
    for row, peer in (
        ("L-Mul 3", "e4m3"), ("L-Mul 4", "e4m3"), ("L-Mul 3, sums fp8_e4m3/32", "e4m3, sums fp8_e4m3/32"),
    ):  # fmt: skip
        found.append(
            Claim("right answers after fine-tuning, over e4m3", f"digits, 64-64-10 network, 3 seeds: {row} over {peer}",
                  _published(1, "x", _ABSTRACT), digits(row, peer), 0.01)
        )  # fmt: skip
    return found
