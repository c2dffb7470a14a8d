"""System 01: bit-weight transformations of tensor processing engines (HPCA 2025, arXiv 2503.06342).

Its claims are in `tensor_engine_digits` (encodings, statistics, synchronisation), `tensor_engine_exactness` (nests and
widths), `tensor_engine_elements` (processing elements in gates), `tensor_engine_arrays` (whole arrays in gates) and
`tensor_engine_claims` (networks, bit-slice peers, and all of these in one list); reports published with the paper in
`tensor_engine_reports`, the engines that are compared in `tensor_engine_variants`.
"""

from __future__ import annotations

from bitwright.reproduce.claims import Claim
from bitwright.reproduce.tensor_engine_claims import all_claims
from bitwright.reproduce.tensor_engine_digits import digit_claims
from bitwright.reproduce.tensor_engine_exactness import exactness_claims

STATUS = "complete"
ENTRY_POINTS = (
    "bitwright.arithmetic.encodings.get",
    "bitwright.engine.baselines.gemm",
    "bitwright.engine.transformations.apply",
    "bitwright.engine.evaluate.run",
    "bitwright.engine.rtl.generate",
    "bitwright.engine.verify.verify",
    "bitwright.engine.engine_gates.engine_gates",
    "bitwright.engine.serial_cycles.array_cycles",
    "bitwright.engine.network_cost.network_cost",
)


def claims() -> tuple[Claim, ...]:
    """Every claim of the paper, and what its official repository states about its own figures."""
    return (*digit_claims(), *exactness_claims(), *all_claims())
