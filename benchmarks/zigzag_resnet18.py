"""ResNet-18 on a TPU-like array: tracing and mapping time, latency and energy, beside ZigZag on the same hardware.

ZigZag runs in its own environment, once, as a subprocess (40 to 60 seconds). Set it up with

    python3 -m venv /tmp/zigzag && /tmp/zigzag/bin/pip install zigzag-dse six
    python benchmarks/zigzag_resnet18.py --peer-python /tmp/zigzag/bin/python      (or BITWRIGHT_ZIGZAG_PYTHON)

The network (ONNX) and the hardware description are those inside ZigZag's wheel; before comparing, every size, width and
energy of our `tpu-like` machine is checked against ZigZag's own file. Writes benchmarks/results/zigzag_resnet18.json.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

from bitwright.core.errors import BitwrightError, InputError, ToolError
from bitwright.core.files import write_json
from bitwright.core.machine import Accelerator, load_machine
from bitwright.core.mapping import LoopMapping, map_workload
from bitwright.core.workload import Operator

RESULT = Path(__file__).parent / "results" / "zigzag_resnet18.json"

PEER = """
import glob, importlib.metadata, json, logging, os, sys, time
import zigzag
from zigzag.api import get_hardware_performance_zigzag
inputs = os.path.join(os.path.dirname(zigzag.__file__), "inputs")
dump = sys.argv[1]
start = time.perf_counter()
energy, latency, _ = get_hardware_performance_zigzag(
    os.path.join(inputs, "workload", "resnet18.onnx"), os.path.join(inputs, "hardware", "tpu_like.yaml"),
    os.path.join(inputs, "mapping", "tpu_like.yaml"), opt="latency", dump_folder=dump, lpf_limit=6,
    loma_show_progress_bar=False)
seconds = time.perf_counter() - start
layers = []
for path in glob.glob(os.path.join(dump, "*_complete.json")):
    with open(path) as file:
        data = json.load(file)
    layer, out = data["inputs"]["layer"], data["outputs"]
    if "name" not in layer:
        continue
    layers.append({"name": layer["name"], "loops": layer["loop_dimensions"], "energy_pj": out["energy"]["energy_total"],
                   "parts": out["latency"], "memory_energy_pj": out["energy"]["memory_energy_breakdown_per_level"]})
print(json.dumps({"version": importlib.metadata.version("zigzag-dse"), "inputs": inputs, "seconds": seconds,
                  "latency_cycles": float(latency), "energy_pj": float(energy), "layers": layers}))
"""

DIFFERENCES = [
    "Loading: both wait for the first tiles before computing. ZigZag's tiles fill the SRAM, so it often loads a "
    "layer's whole input first; the search here also tries tiles of a half and an eighth of the SRAM and starts "
    "earlier, at the price of fetching overlapping windows again: more energy when latency is the objective "
    "(ours_for_energy gives the other end).",
    "One DRAM port: here all reads and writes of a layer share the port's 64 bits per cycle, prologue and epilogue "
    "included, so no layer is faster than its compulsory DRAM traffic. ZigZag overlaps part of the loading and of the "
    "final write-back with other transfers of the same port: layers_below_dram_bound lists where its latency is lower "
    "than moving every weight, input and output once takes.",
    "SRAM ports: ZigZag occupies a port for a whole cycle per access; here a narrow access takes its share of the "
    "width (the SRAM accepts accesses from 64 to 2048 bits), so ZigZag shows stalls where this model shows none.",
    "Search: ZigZag orders up to 6 loop factors, here up to 7 (at most 5040 orders), all evaluated at once with numpy.",
    "Both count multiply-accumulate energy for every product and leave out pooling, additions and activations.",
]


def run_peer(python: str) -> dict:
    """Run ZigZag under its own interpreter. Raises ToolError when that fails."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        try:
            done = subprocess.run([python, "-c", PEER, folder], capture_output=True, text=True, timeout=900, cwd=folder,
                                  env=environment, check=False)  # fmt: skip
        except (OSError, subprocess.TimeoutExpired) as error:
            raise ToolError(f"ZigZag could not be run with {python}: {error}.") from None
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise ToolError(f"ZigZag failed under {python}: {last[0]}. Install it there: pip install zigzag-dse six")
    return json.loads(done.stdout.strip().splitlines()[-1])


def hardware_differences(accelerator: Accelerator, peer_file: Path) -> list[str]:
    """Figures of our accelerator that are not those of ZigZag's file; empty when the two describe the same hardware."""
    theirs = yaml.safe_load(peer_file.read_text())
    names = {"rf_128B": "weight_registers", "rf_2B": "accumulators", "sram_2MB": "sram", "dram": "dram"}
    operands = {"I1": "I", "I2": "W", "O": "O"}
    different = []

    def check(what: str, ours: object, their: object) -> None:
        same = math.isclose(ours, their, rel_tol=1e-9) if isinstance(ours, float) else ours == their
        if not same:
            different.append(f"{what}: ours {ours}, ZigZag's {their}")

    for their_name, memory in theirs["memories"].items():
        ours = accelerator.memories[names[their_name]]
        ports = {port["type"]: port for port in memory["ports"]}
        read, write = (ports.get(kind, ports.get("read_write")) for kind in ("read", "write"))
        check(f"{their_name} size", ours.size.value, float(memory["size"]))
        check(f"{their_name} read energy", ours.read_energy.value * 1e12, float(memory["r_cost"]))
        check(f"{their_name} write energy", ours.write_energy.value * 1e12, float(memory["w_cost"]))
        check(f"{their_name} read width", ours.read_width.value, float(read["bandwidth_max"]))
        check(f"{their_name} write width", ours.write_width.value, float(write["bandwidth_max"]))
        check(f"{their_name} granule", ours.granule.value, float(read["bandwidth_min"]))
        check(f"{their_name} operands", set(ours.operands), {operands[name] for name in memory["operands"]})
        check(f"{their_name} shared", len(ours.shared_along), len(memory["served_dimensions"]))
    array = theirs["operational_array"]
    check("array", [int(d.size.value) for d in accelerator.dimensions.values()], array["sizes"])
    check("MAC energy", accelerator.mac_energy.value * 1e12, float(array["unit_energy"]))
    return different


def loops_of(operator: Operator) -> tuple[int, ...]:
    """Output channels, input channels, output columns, output rows, window: enough to tell layers apart."""
    size = operator.loops
    if operator.kind == "convolution":
        return size["o"], size["c"], size["x"], size["y"], size["s"], size["r"]
    return size["n"], size["k"], 1, 1, 1, 1


def peer_loops(layer: dict) -> tuple[int, ...]:
    size = layer["loops"]
    return tuple(int(size.get(name, 1)) for name in ("K", "C", "OX", "OY", "FX", "FY"))


def dram_bound(operator: Operator, accelerator: Accelerator) -> float:
    """Cycles the DRAM port takes to move every weight, every input that is used, and every output once."""
    tensors = (*operator.inputs[:2], operator.outputs[0])
    elements = sum(tensor.elements(operator.loops) for tensor in tensors)
    return elements * accelerator.weight_bits.value / accelerator.memories["dram"].read_width.value


def totals(mappings: list[LoopMapping]) -> dict:
    return {
        "latency_cycles": sum(m.latency_cycles for m in mappings),
        "compute_cycles": sum(m.compute_cycles for m in mappings),
        "stall_cycles": sum(m.stall_cycles for m in mappings),
        "prologue_cycles": sum(m.prologue_cycles for m in mappings),
        "epilogue_cycles": sum(m.epilogue_cycles for m in mappings),
        "energy_pj": sum(m.energy_j for m in mappings) * 1e12,
        "mac_energy_pj": sum(m.mac_energy_j for m in mappings) * 1e12,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", default=os.environ.get("BITWRIGHT_ZIGZAG_PYTHON"),
                        help="python of the environment with zigzag-dse")  # fmt: skip
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    if not options.peer_python:
        raise InputError("Give --peer-python or BITWRIGHT_ZIGZAG_PYTHON: the python of an environment with zigzag-dse.")
    from bitwright.core.trace_onnx import trace_onnx

    accelerator = load_machine("tpu-like").accelerator
    assert accelerator is not None
    load_before = os.getloadavg()[0]
    peer = run_peer(options.peer_python)
    inputs = Path(peer["inputs"])
    different = hardware_differences(accelerator, inputs / "hardware" / "tpu_like.yaml")
    if different:
        raise BitwrightError(f"The hardware descriptions differ: {'; '.join(different)}.")

    start = time.perf_counter()
    workload = trace_onnx(inputs / "workload" / "resnet18.onnx")
    traced = time.perf_counter()
    mappings, left_out = map_workload(workload, accelerator, "latency")
    mapped = time.perf_counter()
    for_energy, _ = map_workload(workload, accelerator, "energy")

    products = [operator for operator in workload if operator.macs]
    theirs = {peer_loops(layer): layer for layer in peer["layers"]}
    layers, below = [], []
    for operator, mapping in zip(products, mappings, strict=True):
        layer = theirs[loops_of(operator)]
        cycles = sum(layer["parts"].values())
        bound = dram_bound(operator, accelerator)
        if cycles < bound:
            below.append(operator.name)
        layers.append({
            "name": operator.name, "ours_cycles": mapping.latency_cycles, "zigzag_cycles": cycles,
            "dram_bound_cycles": bound, "ours_energy_pj": mapping.energy_j * 1e12,
            "zigzag_energy_pj": layer["energy_pj"],
            "ours_parts": {"compute": mapping.compute_cycles, "stall": mapping.stall_cycles,
                           "prologue": mapping.prologue_cycles, "epilogue": mapping.epilogue_cycles},
            "zigzag_parts": layer["parts"], "order": [list(loop) for loop in mapping.temporal],
        })  # fmt: skip
    ours = {**totals(mappings), "trace_s": traced - start, "map_s": mapped - traced, "seconds": mapped - start}
    result = {
        "benchmark": "ResNet-18 (ONNX in ZigZag's wheel) traced and mapped on a TPU-like array for latency",
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count(),
                    "load_average_before": load_before, "load_average_after": os.getloadavg()[0]},
        "same_hardware": True,
        "ours": {**ours, "evidence": "predicted"},
        "ours_for_energy": totals(for_energy),
        "zigzag": {"version": peer["version"], "latency_cycles": peer["latency_cycles"], "energy_pj": peer["energy_pj"],
                   "seconds": peer["seconds"], "settings": "loma, lpf_limit=6, opt=latency"},
        "ratios": {"times_faster": peer["seconds"] / ours["seconds"],
                   "latency": ours["latency_cycles"] / peer["latency_cycles"],
                   "energy": ours["energy_pj"] / peer["energy_pj"]},
        "layers_below_dram_bound": below,
        "differences": DIFFERENCES,
        "left_out": left_out,
        "layers": layers,
    }  # fmt: skip
    write_json(options.output, result)
    print(f"ours    {ours['latency_cycles']:.4g} cycles  {ours['energy_pj']:.4g} pJ  {ours['seconds']:.2f} s")
    print(f"ZigZag  {peer['latency_cycles']:.4g} cycles  {peer['energy_pj']:.4g} pJ  {peer['seconds']:.2f} s")
    print(f"{result['ratios']['times_faster']:.0f} times faster; wrote {options.output}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BitwrightError as error:
        sys.exit(f"error: {error}")
