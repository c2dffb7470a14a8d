"""System 67: OliVe, outlier-victim pairs (arXiv 2304.07493): codec, statistics, rounding error, element."""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

from bitwright.arithmetic import formats
from bitwright.arithmetic.formats.outlier_victim import OutlierVictimPairs, pair_statistics
from bitwright.core.quantity import Evidence, Quantity
from bitwright.engine.format_products import product_unit
from bitwright.reproduce.claims import Claim

STATUS = "started"
ENTRY_POINTS = (
    "bitwright.arithmetic.formats.outlier_victim.OutlierVictimPairs",
    "bitwright.arithmetic.formats.outlier_victim.pair_statistics",
    "bitwright.engine.format_products.product_unit",
)
_REFERENCE = "reference measurement, independent of this package and not of the paper"
_EXACT = "follows from the encoding of arXiv 2304.07493"


@cache
def _weights() -> tuple[NDArray[np.float32], ...]:
    from torch import nn

    from bitwright.models.load import load

    modules = load("minilm").encoder.modules()
    return tuple(module.weight.detach().numpy() for module in modules if isinstance(module, nn.Linear))


def _shares() -> NDArray[np.float64]:
    pairs = np.array([w.size // 2 for w in _weights()], float)
    rows = [pair_statistics(w) for w in _weights()]
    shares = np.array([(each.normal_normal, each.outlier_normal, each.outlier_outlier) for each in rows])
    return np.asarray(pairs @ shares / pairs.sum())


def relative_error(name: str) -> float:
    """Squared rounding error of all linear weights of MiniLM over their squares."""
    form = formats.parse(name)
    error = sum(np.square(form.decode(form.encode(w)) - w, dtype=np.float64).sum() for w in _weights())
    return float(error / sum(np.square(w, dtype=np.float64).sum() for w in _weights()))


def claims() -> tuple[Claim, ...]:
    """What holds exactly, and MiniLM's statistics. Networks, decoders and whole machines are not measured yet."""
    found = []
    for at, (what, figure) in enumerate((("neither", 98.61), ("one", 1.37), ("both", 0.026))):

        def share(at: int = at) -> Quantity:
            return Quantity(float(_shares()[at]), "%", Evidence.EXECUTED)

        published = Quantity(figure, "%", Evidence.PUBLISHED, _REFERENCE)
        conditions = f"36 linear weights of all-MiniLM-L6-v2, {what} beyond three deviations"
        found.append(Claim("pairs of neighbours", conditions, published, share, 0.05 / figure if at < 2 else 0.05))

    def largest() -> Quantity:
        return Quantity(max(pair_statistics(w).largest_sigma for w in _weights()), "sigma", Evidence.EXECUTED)

    def error() -> Quantity:
        return Quantity(relative_error("ovp4/row"), "", Evidence.EXECUTED)

    def datapath() -> Quantity:
        unit, form = product_unit("ovp4"), OutlierVictimPairs(4, "tensor")
        rng, right = np.random.default_rng(0), 0
        for k in (64, 1024, 4096):
            a, b = (form.encode(rng.normal(0, 12, (4, k)).astype(np.float32), np.ones(1, np.float32)) for _ in range(2))
            sums = unit.matmul(form.operand_words(a), form.operand_words(b).T)
            right += bool((sums == form.integers(a.codes) @ form.integers(b.codes).T).all())
        return Quantity(100 * right / 3, "%", Evidence.EXECUTED, "K = 64, 1,024, 4,096")

    where = "36 linear weights of all-MiniLM-L6-v2"
    found += [
        Claim("largest weight", where, Quantity(175, "sigma", Evidence.PUBLISHED, _REFERENCE), largest, 0.01),
        Claim("relative squared rounding error", f"{where}, 4 bits, scale search per row",
              Quantity(0.0134, "", Evidence.PUBLISHED, _REFERENCE), error, 0.02),
        Claim("exponent-integer products equal to integer products", "4-bit pairs",
              Quantity(100, "%", Evidence.PUBLISHED, _EXACT), datapath, 0.0),
    ]  # fmt: skip
    return tuple(found)
