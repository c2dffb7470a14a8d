"""Claims of system 01 that hold exactly: every nest equals integer multiplication, every state is as wide as needed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from bitwright.arithmetic import encodings
from bitwright.core.quantity import Evidence, Quantity
from bitwright.engine.baselines import gemm
from bitwright.engine.evaluate import Integers, run
from bitwright.engine.nest import Nest
from bitwright.engine.rules import IllegalTransformation
from bitwright.engine.transformations import apply
from bitwright.engine.widths import required_widths
from bitwright.reproduce.claims import Claim

_DEMAND = "follows from the bit-weight decomposition of arXiv 2503.06342"
PARALLEL: tuple[tuple[str, ...], ...] = ((), ("opt1",), ("opt2",), ("sign_free",), ("opt1", "sign_free"))
SERIAL: tuple[tuple[str, ...], ...] = (("opt3",), ("opt4c",), ("opt4e",))  # replace the elements of os and matrix2d
DATAFLOWS = {"os": 1, "ws": 4, "cube": 4, "tree": 4, "matrix2d": 1}  # with their depths
SHAPES = ((1, 1, 1), (7, 5, 3), (36, 98, 47))  # m, k, n
WIDTHS = ((8, 8), (4, 4), (6, 6), (16, 16), (4, 8))  # bits of a and b
_STATES = {(): "acc", ("opt1",): "acc_s", ("opt2",): "acc_s", ("opt3",): "acc_s", ("opt4c",): "acc_s"}


def exact_digits(bits: int) -> tuple[int, int]:
    """Values of `bits` bits that modified Booth and EN-T digits give back, and how many were tried."""
    low = 1 << (bits - 1)
    values = np.arange(-low, low)
    right = sum(
        int((encoding.decode(encoding.digits(values, bits)) == values).sum())
        for encoding in (encodings.get("mbe"), encodings.get("ent"))
    )
    return right, 2 * len(values)


def exact_nests() -> tuple[int, int]:
    """Products that nests evaluate exactly, and how many were tried: dataflows, sequences, shapes and widths."""
    rng = np.random.default_rng(0)
    right = tried = 0
    for dataflow, depth in DATAFLOWS.items():
        for sequence in PARALLEL + SERIAL * (dataflow in ("os", "matrix2d")):
            for a_bits, b_bits in WIDTHS:
                rows = 1 if dataflow in ("ws", "tree") else 2
                nest = apply(gemm(dataflow, rows, 2, depth, a_bits, b_bits, 32 + a_bits), *sequence)
                for m, k, n in SHAPES if (a_bits, b_bits) == (8, 8) else SHAPES[1:2]:
                    for extreme in (False, True):
                        a, b = _operand(rng, (m, k), a_bits, extreme), _operand(rng, (k, n), b_bits, extreme)
                        right += bool((run(nest, a, b) == a @ b).all())
                        tried += 1
    return right, tried


def exact_widths(k: int = 8) -> tuple[int, int]:
    """States that hold the worst operands at the inferred width and lose them with one bit less, and all states."""
    a, b = np.full((2, k), -128), np.full((k, 2), -128)
    right = 0
    for sequence, state in _STATES.items():
        nest = apply(gemm("os", 2, 2), *sequence)
        bits = required_widths(nest, k)[state]
        outcomes = []
        for width in (bits, bits - 1):
            if nest.words[state].bits == nest.words["acc"].bits:
                narrow = apply(gemm("os", 2, 2, accumulator_bits=width), *sequence)
            else:  # the state of one bit weight
                names = {state, "acc_c", "acc_bw"}
                words = tuple(replace(word, bits=width) if word.name in names else word for word in nest.values)
                narrow = replace(nest, values=words)
            outcomes.append(_holds(narrow, a, b))
        right += outcomes == [True, False]
    return right, len(_STATES)


def _holds(nest: Nest, a: Integers, b: Integers) -> bool:
    """Whether a nest gives the product; refusing a K that its states do not hold is not giving it."""
    try:
        return bool((run(nest, a, b, modular=True) == a @ b).all())
    except IllegalTransformation:
        return False


def exactness_claims() -> list[Claim]:
    """Every claim of this module; the published side is what exactness demands, all of them."""
    found = []
    for bits in (4, 6, 8, 12, 16):

        def digits(bits: int = bits) -> Quantity:
            return _share(*exact_digits(bits))

        found.append(Claim("values their digits give back", f"mbe and ent, all of {bits} bits", _all(), digits, 0.0))

    def nests() -> Quantity:
        return _share(*exact_nests())

    def widths() -> Quantity:
        return _share(*exact_widths())

    where = "five dataflows, baseline to OPT4E and sign-free, INT4 to INT16, all-minimum operands too"
    found.append(Claim("products of nests equal to integer multiplication", where, _all(), nests, 0.0))
    where = "worst operands: pass at the inferred width, fail with one bit less"
    found.append(Claim("states of the inferred width", where, _all(), widths, 0.0))
    return found


def _operand(rng: np.random.Generator, shape: tuple[int, int], bits: int, lowest: bool) -> Integers:
    low = 1 << (bits - 1)
    if lowest:
        return np.full(shape, -low, np.int64)
    return rng.integers(-low, low, shape)


def _all() -> Quantity:
    return Quantity(100, "%", Evidence.PUBLISHED, _DEMAND)


def _share(right: int, tried: int) -> Quantity:
    return Quantity(100 * right / tried, "%", Evidence.EXECUTED, f"{right:,} of {tried:,}")
