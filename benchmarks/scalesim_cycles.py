"""Cycle counts of systolic arrays: `bitwright.engine.tensor_engine.cycles` against SCALE-Sim 3.0, row by row.

SCALE-Sim runs as a subprocess in an environment of its own:

    python3 -m venv peer && peer/bin/pip install scalesim 'numpy<2'
    .venv/bin/python benchmarks/scalesim_cycles.py --peer-python peer/bin/python

Its scratchpads are made larger than the operands, so that its memory model adds no stall cycles (the benchmark checks
`Stall Cycles` is 0), and its column `Total Cycles` is compared. Our count uses the convention `scale-sim`: every tile
is filled and drained on its own and the last cycle is numbered from 0. Equality and the ratio of the run times go to
benchmarks/results/scalesim_cycles.json. Exit code 1 when a row differs.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bitwright.core.errors import BitwrightError, ToolError
from bitwright.core.files import write_json
from bitwright.engine.tensor_engine import TensorEngine, cycles

RESULT = Path(__file__).parent / "results" / "scalesim_cycles.json"
# rows, columns, dataflow, products (m, n, k)
CASES = [
    (32, 32, "os", [(128, 64, 256), (512, 512, 512)]),
    (32, 32, "ws", [(128, 64, 256), (100, 70, 130)]),
    (16, 16, "os", [(1, 1, 1), (17, 33, 65), (197, 64, 197), (128, 576, 192)]),
    (16, 16, "ws", [(1, 1, 1), (17, 33, 65), (197, 64, 197), (128, 576, 192)]),
    (8, 24, "os", [(9, 25, 40), (64, 48, 100), (7, 23, 1)]),
    (8, 24, "ws", [(9, 25, 40), (64, 48, 100), (7, 23, 1)]),
]
CONFIGURATION = """[general]
run_name = run
[architecture_presets]
ArrayHeight = {rows}
ArrayWidth = {columns}
IfmapSramSzkB = 65536
FilterSramSzkB = 65536
OfmapSramSzkB = 65536
IfmapOffset = 0
FilterOffset = 100000000
OfmapOffset = 200000000
Dataflow = {dataflow}
Bandwidth = 1000
ReadRequestBuffer = 512
WriteRequestBuffer = 512
[layout]
IfmapCustomLayout = False
FilterCustomLayout = False
IfmapSRAMBankBandwidth = 10
IfmapSRAMBankNum = 10
IfmapSRAMBankPort = 2
FilterSRAMBankBandwidth = 10
FilterSRAMBankNum = 10
FilterSRAMBankPort = 2
[sparsity]
SparsitySupport = false
SparseRep = ellpack_block
OptimizedMapping = false
BlockSize = 8
RandomNumberGeneratorSeed = 40
[run_presets]
InterfaceBandwidth = CALC
UseRamulatorTrace = False
"""
# Times only the run of the simulator, not the start of its interpreter.
DRIVER = """
import sys, time
from scalesim.scale_sim import scalesim
run = scalesim(save_disk_space=True, verbose=False, config="run.cfg", topology="gemm.csv", layout="layout.csv",
               input_type_gemm=True)
start = time.perf_counter()
run.run_scale(top_path="out")
print("seconds", time.perf_counter() - start)
"""


def run_peer(
    python: str, rows: int, columns: int, dataflow: str, gemms: list[tuple[int, int, int]], timeout_s: float
) -> tuple[list[int], float]:
    """`Total Cycles` of every product and the seconds SCALE-Sim took for all of them."""
    names = [f"gemm{index}" for index in range(len(gemms))]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "run.cfg").write_text(CONFIGURATION.format(rows=rows, columns=columns, dataflow=dataflow))
        lines = [f"{layer},{m},{n},{k}," for layer, (m, n, k) in zip(names, gemms, strict=True)]
        (folder / "gemm.csv").write_text("\n".join(["Layer,M,N,K,", *lines]) + "\n")
        lines = [f"{layer}," + "1," * 20 for layer in names]
        (folder / "layout.csv").write_text("\n".join(["Layer," + "x," * 20, *lines]) + "\n")
        try:
            done = subprocess.run(
                [python, "-c", DRIVER], cwd=folder, capture_output=True, text=True, timeout=timeout_s, check=False
            )
        except FileNotFoundError:
            raise ToolError(f"There is no {python}; see the top of this file for how to install SCALE-Sim.") from None
        except subprocess.TimeoutExpired:
            raise ToolError(f"SCALE-Sim took longer than {timeout_s:g} s; raise --timeout.") from None
        reports = list(folder.glob("out/**/COMPUTE_REPORT.csv"))
        if done.returncode or not reports:
            raise ToolError(f"SCALE-Sim failed:\n{(done.stderr or done.stdout)[-2000:]}")
        with reports[0].open() as file:
            table = [{key.strip(): value for key, value in row.items() if key} for row in csv.DictReader(file)]
    if len(table) != len(gemms):
        raise ToolError(f"SCALE-Sim reported {len(table)} layers for {len(gemms)} products.")
    stalled = [row for row in table if float(row["Stall Cycles"])]
    if stalled:
        raise ToolError(
            f"SCALE-Sim reports stall cycles ({stalled[0]}); its scratchpads are too small for this product."
        )
    counts = [int(float(row["Total Cycles"])) for row in table]
    return counts, float(done.stdout.rsplit("seconds", 1)[1])


def run_ours(array: TensorEngine, gemms: list[tuple[int, int, int]]) -> tuple[list[int], float]:
    """The same counts, one call per product, and the seconds of the median of 201 repetitions of them all."""
    seconds = []
    for _ in range(201):
        start = time.perf_counter()
        counts = [int(cycles(array, *gemm, "scale-sim")) for gemm in gemms]
        seconds.append(time.perf_counter() - start)
    return counts, sorted(seconds)[len(seconds) // 2]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", required=True, help="Python of the environment SCALE-Sim is installed in")
    parser.add_argument("--timeout", type=float, default=900, help="seconds allowed per configuration")
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    peer = str(Path(options.peer_python).absolute())
    rows_out: list[dict[str, Any]] = []
    runs: list[dict[str, Any]] = []
    for rows, columns, dataflow, gemms in CASES:
        theirs, peer_seconds = run_peer(peer, rows, columns, dataflow, gemms, options.timeout)
        shape = {"rows": 1, "depth": rows} if dataflow == "ws" else {"rows": rows}
        ours, our_seconds = run_ours(TensorEngine(columns=columns, dataflow=dataflow, **shape), gemms)
        for (m, n, k), their, our in zip(gemms, theirs, ours, strict=True):
            rows_out.append({"rows": rows, "columns": columns, "dataflow": dataflow, "m": m, "n": n, "k": k,
                             "scalesim_cycles": their, "bitwright_cycles": our, "equal": their == our})  # fmt: skip
            print(f"{rows:>3}x{columns:<3} {dataflow} {m:>4}x{n:>4}x{k:>4}: {their:>8} {our:>8} {their == our}")
        runs.append({
            "rows": rows, "columns": columns, "dataflow": dataflow, "products": len(gemms),
            "scalesim_s": peer_seconds, "bitwright_s": our_seconds, "ratio": peer_seconds / our_seconds,
        })  # fmt: skip
        print(f"    {peer_seconds:.3f} s against {our_seconds * 1e6:.1f} us: x{peer_seconds / our_seconds:,.0f}")
    total = sum(run["scalesim_s"] for run in runs), sum(run["bitwright_s"] for run in runs)
    equal = all(row["equal"] for row in rows_out)
    write_json(options.output, {
        "peer": "scalesim 3.0.0", "evidence": "executed", "all_equal": equal,
        "ratio_total": total[0] / total[1], "ratio_minimum": min(run["ratio"] for run in runs),
        "runs": runs, "rows": rows_out,
    })  # fmt: skip
    print(f"{len(rows_out)} rows, all equal: {equal}; in all x{total[0] / total[1]:,.0f}")
    return 0 if equal else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BitwrightError as error:
        sys.exit(str(error))
