"""Decoding of SmolLM2-135M on low-bit weights beside llama.cpp on this CPU, runs interleaved.

    python -m venv peer && peer/bin/pip install llama-cpp-python==0.3.36
    python benchmarks/low_bit_decoding.py --peer peer/bin/python [--threads 1 2] [--repeats 9]

Both decode 64 tokens after the same 16, greedily, from the GGUF file of the package (Q4_1 layers); ours also on weights
rounded again to 2 and 1 bits. The bound is what streaming all weights once per token at the measured bandwidth allows
(`bitwright machine measure`). Perplexity of both is over 512 tokens of 1 Kings. Writes
benchmarks/results/low_bit_decoding.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from bitwright.kernels.benchmark import this_machine
from bitwright.kernels.work import rates_of
from bitwright.models.load import load, weight_paths
from bitwright.models.low_bit_decoder import LowBitDecoder, generate, load_low_bit, perplexity
from bitwright.models.perplexity import packaged_text, text_ids
from bitwright.models.perplexity import perplexity as reference

RESULT = Path(__file__).parent / "results" / "low_bit_decoding.json"
NEW, PROMPT, SCORED = 64, 16, 513
PEER = """
import json, math, sys, time
from llama_cpp import Llama
path, ids = sys.argv[1], json.loads(sys.argv[2])
models = {}
for line in sys.stdin:
    order = json.loads(line)
    threads = order["threads"]
    if threads not in models:
        models[threads] = Llama(path, n_threads=threads, n_threads_batch=threads, n_ctx=1024, logits_all=True,
                                verbose=False)
    model = models[threads]
    model.reset()
    if "score" in order:
        model.eval(order["score"][:-1])
        total = 0.0
        for row, target in zip(model.scores[: len(order["score"]) - 1], order["score"][1:]):
            top = float(row.max())
            total += top + math.log(float(sum(math.exp(float(v) - top) for v in row))) - float(row[target])
        print(json.dumps(math.exp(total / (len(order["score"]) - 1))), flush=True)
        continue
    model.eval(ids)
    token = model.sample(temp=0)
    start = time.perf_counter()
    for _ in range(order["new"]):
        model.eval([token])
        token = model.sample(temp=0)
    print(json.dumps(order["new"] / (time.perf_counter() - start)), flush=True)
"""


def ours(decoder: LowBitDecoder, ids: list[int]) -> float:
    """Tokens per second after the prompt and the first token."""
    steps = generate(decoder, ids, NEW + 1)
    next(steps)
    start = perf_counter()
    count = sum(1 for _ in steps)
    return count / (perf_counter() - start)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--peer", type=Path, required=True, help="Python with llama-cpp-python")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=9)
    asked = parser.parse_args()
    path = weight_paths("smollm2-135m")[0]
    loaded = load("smollm2-135m")
    text = text_ids(loaded.text_tokenizer, packaged_text("kjv-kings.txt"), SCORED)
    ids = text[:PROMPT].tolist()
    decoders = {"Q4_1": load_low_bit("smollm2-135m", capacity=1024).decoder} | {
        f"W{bits}": load_low_bit("smollm2-135m", bits, capacity=1024).decoder for bits in (4, 3, 2, 1)
    }
    peer = subprocess.Popen(
        [asked.peer, "-c", PEER, path, json.dumps(ids)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )

    def ask(**order: Any) -> float:
        assert peer.stdin is not None
        assert peer.stdout is not None
        peer.stdin.write(json.dumps(order) + "\n")
        peer.stdin.flush()
        return float(json.loads(peer.stdout.readline()))

    quality = {name: perplexity(each, text, window=512).value for name, each in decoders.items()}
    quality |= {
        "float32": reference(loaded.decoder, text, window=512).value,
        "llama.cpp": ask(threads=1, score=text.tolist()),
    }
    data: dict[str, Any] = {"evidence": "executed", "peer": "llama-cpp-python 0.3.36", "perplexity": quality,
                            "load average before": os.getloadavg()[0]}  # fmt: skip
    bandwidth = rates_of(this_machine().device()).bytes_per_s["memory"]
    for threads in asked.threads:
        speeds: dict[str, list[float]] = {name: [] for name in (*decoders, "llama.cpp")}
        for repeat in range(asked.repeats + 1):
            for name, decoder in decoders.items():
                decoder.threads = threads
                speeds[name].append(ours(decoder, ids))
            speeds["llama.cpp"].append(ask(threads=threads, new=NEW))
            if not repeat:
                speeds = {name: [] for name in speeds}
        middle = {name: median(each) for name, each in speeds.items()}
        data[f"{threads} threads"] = {
            "tokens per second": middle,
            "times as fast as llama.cpp": {name: middle[name] / middle["llama.cpp"] for name in decoders},
            "share of the bandwidth bound": {
                name: middle[name] * decoder.work(PROMPT + NEW // 2).traffic["memory"] / bandwidth
                for name, decoder in decoders.items()
            },
        }
        print(threads, json.dumps(data[f"{threads} threads"], indent=1), flush=True)
    peer.terminate()
    data["weight bytes per token"] = {name: decoder.weight_bytes for name, decoder in decoders.items()}
    data["bandwidth bytes per second"] = bandwidth
    print(quality)
    RESULT.write_text(json.dumps(data, indent=1) + "\n")
