"""System 59: L-Mul, multiplication by integer addition (arXiv 2410.00907): arithmetic, errors, energies and gates."""

from __future__ import annotations

from bitwright.arithmetic import logarithmic_multiplication as lmul
from bitwright.core import cache
from bitwright.core.quantity import Evidence, Quantity
from bitwright.engine.libraries import find_library
from bitwright.engine.standalone_units import Unit, float_multiplier, logarithmic_multiplier, unit_gates
from bitwright.reproduce.claims import Claim

STATUS = "started"
ENTRY_POINTS = (
    "bitwright.arithmetic.logarithmic_multiplication.multiply",
    "bitwright.arithmetic.logarithmic_multiplication.matmul",
    "bitwright.arithmetic.logarithmic_multiplication.error",
    "bitwright.engine.standalone_units.logarithmic_multiplier",
    "bitwright.models.logarithmic_layers.with_logarithmic_products",
)
_PAPER = "arXiv 2410.00907"
_REFERENCE = "reference measurement, independent of this package and not of the paper"
# Mean absolute relative error by mantissa bits: exact product rounded, adder, adder without constant, algebraic.
ERRORS = {
    2: (0.070, 0.146, 0.069, 0.118), 3: (0.035, 0.058, 0.048, 0.073), 4: (0.018, 0.053, 0.041, 0.070),
    7: (0.0023, 0.027, 0.039, 0.075), 10: (0.0003, 0.027, 0.039, 0.076),
}  # fmt: skip
_FORMS: tuple[tuple[str, lmul.Form | str, lmul.Offset], ...] = (
    ("exact product, rounded", "product", "paper"), ("adder", "adder", "paper"),
    ("adder without the constant", "adder", "none"), ("algebraic", "algebraic", "paper"),
)  # fmt: skip
# Exponent and mantissa bits, and L-Mul over multiplier: area, period (OSU018, open tools, registers on both sides).
GATES = {
    "e5m2": (5, 2, 1.14, 0.85), "e4m3": (4, 3, 0.74, 0.64), "bf16": (8, 7, 0.50, 0.45), "fp16": (5, 10, 0.32, 0.42),
    "fp32": (8, 23, 0.17, 0.32),
}  # fmt: skip
LIBRARIES = ("osu018", "predictive-28nm")


def units(fmt: str) -> tuple[Unit, Unit]:
    """The plain and the logarithmic multiplier of a format."""
    exponent, mantissa = GATES[fmt][:2]
    layout = lmul.FORMATS[fmt]
    top = int(lmul.codes([layout.largest], fmt)[0])
    return float_multiplier(exponent, mantissa), logarithmic_multiplier(exponent, mantissa, layout.saturates, top)


def _error_claims() -> list[Claim]:
    found = []
    for mantissa, row in ERRORS.items():
        for (label, form, offset), figure in zip(_FORMS, row, strict=True):

            def ours(mantissa: int = mantissa, form: str = form, offset: lmul.Offset = offset) -> Quantity:
                report = lmul.error(mantissa, form=form, offset=offset)  # type: ignore[arg-type]
                return Quantity(report.mean_absolute, "", Evidence.EXECUTED, f"bias {report.bias:+.4f}")

            published = Quantity(figure, "", Evidence.PUBLISHED, _REFERENCE)
            # the table is rounded to its last digit
            tolerance = max(0.02, (0.00005 if figure < 0.01 else 0.0005) / figure)
            conditions = f"{label}, {mantissa} mantissa bits, 10^6 pairs of uniform fractions"
            found.append(Claim("mean absolute relative error of a product", conditions, published, ours, tolerance))

    def beats() -> Quantity:
        return Quantity(
            lmul.error(3).mean_absolute / lmul.error(2, form="product").mean_absolute, "x", Evidence.EXECUTED
        )

    def equals() -> Quantity:
        return Quantity(
            lmul.error(4).mean_absolute / lmul.error(3, form="product").mean_absolute, "x", Evidence.EXECUTED
        )

    for what, measure, why in (
        ("3-bit L-Mul over e5m2 product: below 1 as claimed", beats, "single products of uniform fractions"),
        ("4-bit L-Mul over e4m3 product: about 1 claimed", equals,
         "single products; the claim is about networks, where the common bias cancels"),
    ):  # fmt: skip
        found.append(
            Claim("precision", what, Quantity(1, "x", Evidence.PUBLISHED, f"{_PAPER}, abstract"), measure, None, why)
        )
    return found


def _gate_claims() -> list[Claim]:
    found = []
    note = (
        "zero, underflow and overflow are detected in L-Mul only; small multipliers of the reference came out larger, "
        "so that ours gain less from L-Mul in FP8"
    )
    for library in LIBRARIES:
        for fmt, (_, _, area, period) in GATES.items():
            for what, figure in (("area", area), ("period", period)):

                def ours(fmt: str = fmt, what: str = what, library: str = library) -> Quantity:
                    plain, fast = (unit_gates(unit, find_library(library)) for unit in units(fmt))
                    if what == "area":
                        ratio = fast.area_um2 / plain.area_um2
                    else:
                        ratio = (fast.period_s or 0.0) / (plain.period_s or 1.0)
                    return Quantity(ratio, "x", Evidence.SYNTHESISED, library)

                published = Quantity(figure, "x", Evidence.PUBLISHED, f"{_REFERENCE}, OSU018")
                tolerance = 0.2 if library == "osu018" else None
                conditions = f"{fmt}, {library}, between registers"
                found.append(Claim(f"L-Mul over multiplier, {what}", conditions, published, ours, tolerance, note))
    return found


def claims() -> tuple[Claim, ...]:
    """Energies of the abstract, error table, gates, and attention of a small language model."""

    def multiply() -> Quantity:
        return Quantity(100 * lmul.energy_saving(False), "%", Evidence.PREDICTED, "45 nm operation energies")

    def accumulate() -> Quantity:
        return Quantity(100 * lmul.energy_saving(True), "%", Evidence.PREDICTED, "45 nm operation energies")

    def with_memory() -> Quantity:
        saved = lmul.energy_saving(True, memory_j_per_bit=20e-12)
        return Quantity(100 * saved, "%", Evidence.PREDICTED, "weights read once each at 20 pJ/bit")

    energy = [
        Claim("energy saved, element-wise", "fp32 multiplication to int32 addition, 45 nm",
              Quantity(95, "%", Evidence.PUBLISHED, f"{_PAPER}, abstract"), multiply, 0.03),
        Claim("energy saved, dot product", "fp32 multiply-accumulate, 45 nm",
              Quantity(80, "%", Evidence.PUBLISHED, f"{_PAPER}, abstract"), accumulate, 0.03),
        Claim("energy saved, dot product", "the same with fp32 weights from DRAM, each used once",
              Quantity(80, "%", Evidence.PUBLISHED, f"{_PAPER}, abstract"), with_memory, None,
              "operation energies alone are what the abstract counts"),
    ]  # fmt: skip
    attention = Claim(
        "perplexity with L-Mul in attention", "4-bit mantissa, adder form; published: nearly lossless, 8B-class models",
        Quantity(1, "x", Evidence.PUBLISHED, f"{_PAPER}, abstract"), attention_perplexity, None,
        "a model of 135 M parameters; the common bias of the products sharpens its softmax",
    )  # fmt: skip
    return (*energy, *_error_claims(), *_gate_claims(), attention)


def attention_perplexity() -> Quantity:
    """Perplexity of SmolLM2-135M with L-Mul in its attention over that without, 4 windows of 256 tokens; cached."""
    from bitwright.models.load import load, weight_paths
    from bitwright.models.logarithmic_layers import with_logarithmic_products
    from bitwright.models.perplexity import perplexity, read_text, text_ids

    text = read_text(None)
    inputs = {
        "version": 1, "weights": [cache.file_digest(path) for path in weight_paths("smollm2-135m")],
        "text": text.digest, "mantissa": 4, "windows": 4, "window": 256,
    }  # fmt: skip

    def compute() -> dict[str, float]:
        loaded = load("smollm2-135m")
        ids = text_ids(loaded.text_tokenizer, text, 4 * 256 + 1)
        changed = with_logarithmic_products(loaded.decoder, "attention", 4)
        return {
            name: perplexity(model, ids, window=256, description=f"Perplexity, {name}").value
            for name, model in (("fp32", loaded.decoder), ("L-Mul", changed))
        }

    found = cache.get_or_compute("l-mul-attention", inputs, compute)
    value = found["L-Mul"] / found["fp32"]
    return Quantity(value, "x", Evidence.EXECUTED, f"SmolLM2-135M, {found['fp32']:.2f} to {found['L-Mul']:.2f}")
