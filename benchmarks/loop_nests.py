"""How long one engine floor takes: nests evaluated, arrays verified, the whole table of processing elements mapped.

    python benchmarks/loop_nests.py

Writes benchmarks/results/loop_nests.json. Evaluations are 64 x 64 x 64 INT8 products beside numpy's int64 product, the
exact reference, in the same run; every product is compared with it. The table is mapped with an empty cache.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from bitwright.core.files import write_json
from bitwright.engine.evaluate import run
from bitwright.engine.tensor_engine import TensorEngine
from bitwright.engine.verify import verify
from bitwright.reproduce.tensor_engine_elements import ELEMENTS, REFERENCE_LIBRARY, processing_element

RESULT = Path(__file__).parent / "results" / "loop_nests.json"
ENGINES = [
    (dataflow, names)
    for dataflow in ("os", "ws", "cube", "tree", "matrix2d")
    for names in ((), ("opt1",), ("opt2",), ("opt3",), ("opt4c",), ("opt4e",))
    if names[:1] not in (("opt3",), ("opt4c",), ("opt4e",)) or dataflow in ("os", "matrix2d")
]  # fmt: skip


def least_s(call: Callable[[], object], repeats: int = 5) -> float:
    """Seconds of the fastest of some calls."""
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return min(found)


def evaluations() -> dict[str, object]:
    """Seconds of every nest, and as a multiple of numpy's product."""
    rng = np.random.default_rng(0)
    a, b = rng.integers(-128, 128, (64, 64)), rng.integers(-128, 128, (64, 64))
    peer = least_s(lambda: a @ b, 50)
    rows: dict[str, object] = {"numpy int64": {"s": peer}}
    for dataflow, names in ENGINES:
        depth = 1 if dataflow in ("os", "matrix2d") else 8
        rows_of = 1 if dataflow in ("ws", "tree") else 8
        nest = TensorEngine(rows_of, 8, names, dataflow, depth, encoding="ent" if "opt4e" in names else "mbe").nest
        if not np.array_equal(run(nest, a, b), a @ b):
            raise SystemExit(f"{dataflow} {names} is not exact")
        seconds = least_s(lambda nest=nest: run(nest, a, b))  # type: ignore[misc]
        rows[f"{dataflow} {', '.join(names) or 'plain'}"] = {"s": seconds, "over numpy": seconds / peer}
        print(f"{dataflow:9} {', '.join(names) or 'plain':6} {1e3 * seconds:7.1f} ms")
    return rows


def main() -> None:
    result: dict[str, object] = {"evidence": "executed", "64 x 64 x 64 INT8": evaluations()}
    for names, encoding in ((("opt1",), "mbe"), (("opt4e",), "ent")):
        start = time.perf_counter()
        report = verify(TensorEngine(8, 8, names, encoding=encoding), vectors=3000, simulator="icarus")
        if not report.passed:
            raise SystemExit(f"{names}: {report.first_mismatch}")
        seconds = time.perf_counter() - start
        result[f"verification, 8x8 {names[0]}, Icarus"] = {"vectors": report.vectors, "s": seconds}
        print(f"verification of {names[0]}: {report.vectors} vectors, {seconds:.1f} s")
    made = [name for name, element in ELEMENTS.items() if element.transformations is not None]
    with tempfile.TemporaryDirectory() as folder:
        os.environ["BITWRIGHT_CACHE"] = folder
        start = time.perf_counter()
        mapped = sum(len(processing_element(name, REFERENCE_LIBRARY).candidates) for name in made)
        seconds = time.perf_counter() - start
    result[f"processing elements, {REFERENCE_LIBRARY}, cold"] = {
        "elements": len(made),
        "mappings": mapped,
        "s": seconds,
    }
    print(f"{len(made)} elements, {mapped} mappings: {seconds:.1f} s")
    write_json(RESULT, result)


if __name__ == "__main__":
    main()
