"""System 32: bipolar integers, products of one-bit planes (arXiv 2409.17870, 2508.19087)."""

from __future__ import annotations

import subprocess
import sys
from functools import partial

import numpy as np

from bitwright.arithmetic.formats.bipolar import decode, from_signed
from bitwright.core import cache
from bitwright.core.errors import BitwrightError
from bitwright.core.quantity import Evidence, Quantity
from bitwright.engine.libraries import find_library
from bitwright.engine.rtl import PE, generate_part
from bitwright.engine.rtl.bit_plane_unit import BitPlaneUnit
from bitwright.engine.standalone_units import unit_gates
from bitwright.engine.synthesis import synthesise
from bitwright.engine.tensor_engine import TensorEngine
from bitwright.kernels.bit_plane_cost import best_tile, gpu, gpu_peer_cost, gpu_speed_up
from bitwright.kernels.bit_plane_matmul import matmul, pack, tiling
from bitwright.models.bit_plane_linear import bit_plane_execution
from bitwright.models.load import load, weight_paths
from bitwright.models.perplexity import perplexity, read_text, text_ids
from bitwright.reproduce.claims import Claim

STATUS = "complete"
ENTRY_POINTS = (
    "bitwright.kernels.bit_plane_matmul.matmul",
    "bitwright.kernels.bit_plane_cost.select_kernel",
    "bitwright.models.bit_plane_linear.bit_plane_execution",
    "bitwright.arithmetic.formats.bipolar.from_signed",
    "bitwright.engine.rtl.bit_plane_unit.BitPlaneUnit",
)
LIBRARIES = ("osu018", "predictive-28nm")
# Bits of weights and inputs, and what shares a scale of the weights: a row, or so many inputs (inputs too).
NETWORKS: tuple[tuple[int, int, str | int], ...] = (
    (8, 8, "row"), (4, 8, 32), (4, 4, 32), (3, 4, "row"), (4, 4, "row"), (2, 8, "row"),
)  # fmt: skip
WINDOWS, WINDOW = 2, 512
_VERSION = 1
_PAPER = "arXiv 2409.17870, abstract (version 2)"
_KERNELS = "arXiv 2508.19087, abstract"
_EXACT = "follows from the format of arXiv 2409.17870"
# Linear layers of one block of Llama-2-7B: (outputs, inputs).
_BLOCK = ((4096, 4096),) * 4 + ((11008, 4096),) * 2 + ((4096, 11008),)


def exact_products() -> tuple[int, int]:
    """Products of all 64 pairs of widths that equal integer arithmetic, and how many were tried."""
    rng, right = np.random.default_rng(0), 0
    widths = [(p, q) for p in range(1, 9) for q in range(1, 9)]
    for p, q in widths:
        w, a = (rng.integers(0, 1 << bits, (rows, 1000)).astype(np.uint8) for bits, rows in ((p, 9), (q, 7)))
        right += bool((matmul(pack(w, p), pack(a, q)) == decode(w, p) @ decode(a, q).T).all())
    return right, len(widths)


def lossless() -> tuple[int, int]:
    """Signed integers of 1 to 8 bits whose bipolar value with converted scale and offset is s v + z but for rounding in
    float64, of all, for random s and z."""
    rng, right, tried = np.random.default_rng(0), 0, 0
    for bits in range(1, 9):
        v = np.arange(-(1 << (bits - 1)), 1 << (bits - 1))[None]
        for scale, zero in rng.normal(size=(20, 2)):
            made = from_signed(v, bits, abs(scale), zero)
            size = np.abs(scale) * (2 << bits) + np.abs(zero)  # of the largest term
            right += int((np.abs(made.values - (abs(scale) * v + zero)) <= 4 * np.finfo(float).eps * size).sum())
            tried += v.size
    return right, tried


_MEMORY = """
import sys
import numpy as np
from bitwright.kernels.bit_plane_matmul import matmul, pack

def kilobytes(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field))

size = int(sys.argv[1])
rng = np.random.default_rng(0)
w, a = (pack(rng.integers(0, 4, (size, size), np.uint8), 2) for _ in range(2))
matmul(pack(np.zeros((64, 512), np.uint8), 2), pack(np.zeros((64, 512), np.uint8), 2), 2)
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
before = kilobytes("VmRSS")
matmul(w, a, 2)
print((kilobytes("VmHWM") - before) * 1024 / (4 * size * size))
"""


def extra_memory(size: int = 4096) -> float:
    """Most resident bytes that a W2A2 product of size^3 adds to a process that holds its operands, native code's too,
    over those of its int32 result. Raises BitwrightError where the peak cannot be read (other systems than Linux)."""
    done = subprocess.run([sys.executable, "-c", _MEMORY, str(size)], capture_output=True, text=True, timeout=300,
                          check=False)  # fmt: skip
    if done.returncode:
        raise BitwrightError(f"The peak memory of a process could not be read: {done.stderr.strip()[-200:]}")
    return float(done.stdout)


def network(p: int, q: int, granularity: str | int, rounded: bool) -> float:
    """Perplexity of SmolLM2-135M, linear layers of p-bit weights and q-bit inputs on planes, or (`rounded`) the same
    values as ordinary matrices; 2 windows of 512 tokens, executed, cached."""
    text = read_text()

    def compute() -> float:
        loaded = load("smollm2-135m")
        changed = bit_plane_execution(loaded.decoder, p, q, granularity, keep=("lm_head",), rounded=rounded)
        ids = text_ids(loaded.text_tokenizer, text, WINDOWS * WINDOW + 1)
        return perplexity(changed, ids, window=WINDOW, description=f"Perplexity, W{p}A{q}").value

    inputs = {
        "version": _VERSION, "weights": [cache.file_digest(path) for path in weight_paths("smollm2-135m")],
        "text": text.digest, "widths": [p, q, granularity], "rounded": rounded, "windows": [WINDOWS, WINDOW],
    }  # fmt: skip
    found: float = cache.get_or_compute("bit-plane-models", inputs, compute)
    return found


def unit_over_multiplier(bits: int, library: str, positions: int = 256) -> float:
    """Area times period per multiply-accumulate: the better single-cycle or two-stage integer MAC of `bits` bits over
    planes of W`bits`A`bits`, at equal throughput; 32-bit sums on both sides."""
    cells = find_library(library)
    report = unit_gates(BitPlaneUnit(positions), cells)
    planes = report.area_um2 * (report.period_s or report.longest_path_s) * bits * bits / positions
    peers = []
    for transformations in ((), ("pipeline p",)):
        engine = TensorEngine(16, 16, transformations, multiplier=f"int{bits}")
        mac = synthesise(generate_part(engine, PE, drains=False), PE, cells)
        peers.append(mac.area_um2 * (mac.period_s or mac.longest_path_s))
    return min(peers) / planes


def block_speed_up(device: str, rows: int, p: int, q: int, peer: str) -> float:
    """Predicted time of the linear layers of one block of Llama-2-7B in `peer` over that on planes, `rows` tokens."""
    described = gpu(device)
    plans = [tiling(outputs, rows, inputs, p, q) for outputs, inputs in _BLOCK]
    planes = sum(best_tile(described, plan)[1].time_s for plan in plans)
    return sum(gpu_peer_cost(described, plan, peer).time_s for plan in plans) / planes


def _published(value: float, unit: str, where: str) -> Quantity:
    return Quantity(value, unit, Evidence.PUBLISHED, where)


def _share(counted: tuple[int, int]) -> Quantity:
    return Quantity(100 * counted[0] / counted[1], "%", Evidence.EXECUTED, f"{counted[0]} of {counted[1]}")


def _best_gpu() -> Quantity:
    shapes = [(m, n, k) for m in (4096, 11008) for n in (1, 16, 64, 512, 4096) for k in (4096, 11008)]
    ratios = {(shape, bits): gpu_speed_up("RTX 3090", *shape, *bits)
              for shape in shapes for bits in ((1, 1), (1, 2), (2, 2))}  # fmt: skip
    (shape, bits), value = max(ratios.items(), key=lambda item: item[1])
    return Quantity(value, "x", Evidence.PREDICTED, f"W{bits[0]}A{bits[1]}, {shape}; the peer at its peak")


def _at(shape: tuple[int, int, int], p: int, q: int) -> Quantity:
    value = gpu_speed_up("RTX 3090", *shape, p, q)
    return Quantity(value, "x", Evidence.PREDICTED, f"W{p}A{q}, {shape}; the peer at its peak")


def _network_ratio(p: int, q: int, granularity: str | int) -> Quantity:
    planes, ordinary = (network(p, q, granularity, rounded) for rounded in (False, True))
    return Quantity(planes / ordinary, "x", Evidence.EXECUTED, f"perplexity {planes:.6g} and {ordinary:.6g}")


def _range(device: str, peer: str) -> Quantity:
    found = {(p, q, rows): block_speed_up(device, rows, p, q, peer)
             for p, q in ((1, 1), (1, 2), (2, 2), (3, 4)) for rows in (1, 16, 2048)}  # fmt: skip
    (p, q, rows), best = max(found.items(), key=lambda item: item[1])
    text = f"x{min(found.values()):.2f} to x{best:.2f} over W1A1 to W3A4 and 1 to 2,048 tokens; best W{p}A{q}, {rows}"
    return Quantity(best, "x", Evidence.PREDICTED, f"{text}; linear layers only, peers at their peaks")


def claims() -> tuple[Claim, ...]:
    """Exactness, networks, gates, and what peaks allow. CPU speed is in `benchmarks/bit_plane_matmul.py`."""
    found = [
        Claim("products equal to integer arithmetic", "1 to 8 by 1 to 8 bits, K = 1,000",
              _published(100, "%", _EXACT), lambda: _share(exact_products()), 0.0),
        Claim("conversion from signed integers", "1 to 8 bits, all values, random scales and offsets, float64",
              _published(100, "%", "arXiv 2508.19087, v' = 2v + 1"), lambda: _share(lossless()), 0.0),
        Claim("peak extra memory of a product", "W2A2, 4,096 cubed, over its int32 result, the result included",
              _published(1.0, "x", "no plane products in memory: arXiv 2409.17870"),
              lambda: Quantity(extra_memory(), "x", Evidence.EXECUTED), 0.2),
        Claim("speed over int4 products", "RTX 3090, best shape and width up to W2A2", _published(2.4, "x", _PAPER),
              _best_gpu, None, "at peaks W1A1 is four times int4; the published widths and shapes are not named"),
        Claim("speed over int4 products", "RTX 3090, W1A2, 4,096 cubed", _published(2.4, "x", _PAPER),
              partial(_at, (4096, 4096, 4096), 1, 2), 0.25, "the narrowest pair of different widths that is published"),
        Claim("speed over int4 products", "RTX 3090, W2A2, compute-bound",
              _published(1.0, "x", "vendor peaks: 2,276 and 568 TOPS"), partial(_at, (4096, 4096, 4096), 2, 2), 0.05),
        Claim("speed over int4 products", "version 1 of the abstract", _published(13.0, "x", "arXiv 2409.17870 v1"),
              _best_gpu, None, "withdrawn by version 2, which states 2.4"),
    ]  # fmt: skip
    for device, peer, value, where in (
        ("RTX 3090", "fp16", 6.7, _PAPER), ("RTX 3090", "fp16", 3.99, _KERNELS), ("RTX 3090", "int4", 2.16, _KERNELS),
        ("RTX 4090", "int4", 2.44, _KERNELS), ("H800", "int8", 1.65, _KERNELS),
    ):  # fmt: skip
        found.append(
            Claim("end to end, linear layers of a 7B model", f"{device} over {peer}; published x{value:g}",
                  _published(value, "x", where), partial(_range, device, peer), None,
                  "attention, framework time and the published software's efficiency are not modelled: a range")
        )  # fmt: skip
    for p, q, granularity in NETWORKS:
        shared = granularity if isinstance(granularity, str) else f"{granularity} inputs"
        found.append(
            Claim("perplexity on planes over that of the same values",
                  f"SmolLM2-135M, W{p}A{q} linear layers, a scale per {shared}", _published(1.0, "x", _EXACT),
                  partial(_network_ratio, p, q, granularity), 1e-6,
                  "round to nearest without calibration: what is claimed is that the kernel adds no error")
        )  # fmt: skip
    for library in LIBRARIES:
        for bits in (4, 8):

            def gates(bits: int = bits, library: str = library) -> Quantity:
                value = unit_over_multiplier(bits, library)
                return Quantity(value, "x", Evidence.SYNTHESISED, "256 positions per cycle, area times period")

            found.append(
                Claim(f"int{bits} multiply-accumulate over planes of W{bits}A{bits}", f"{library}, equal throughput",
                      _published(1.0, "x", "not published; above 1 the planes need less"), gates, None,
                      "planes take bits squared cycles; they gain where widths change, not at one fixed width")
            )  # fmt: skip
    return tuple(found)
