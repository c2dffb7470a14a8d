"""Outlier-victim pairs beside optimum-quanto and torchao: accuracy of MiniLM and SmolLM2-135M, time to quantise.

    pip install --no-deps --target peers optimum-quanto torchao
    PYTHONPATH=peers python benchmarks/outlier_victim_pairs.py

Weights have one scale per output channel everywhere. Inputs: pairs and optimum-quanto have one fixed scale per layer,
from the same calibration texts; torchao has one per token, found at run time, which is finer. Writes
benchmarks/results/outlier_victim_pairs.json; peers that are not installed are left out, and named.

    python benchmarks/outlier_victim_pairs.py --speed [--values 10000000]

measures only the codec and the search for scales, on one core: the search with bounds beside the one that tries every
scale on every value, in turns, and rounding with known scales beside PyTorch's cast to 8-bit floats. Writes
benchmarks/results/outlier_victim_speed.json. Times are processor time of the thread, the least of several repeats.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from bitwright.arithmetic.formats.outlier_victim import OutlierVictimPairs
from bitwright.compression.outlier_victim_pairs import PairSettings, apply
from bitwright.core.files import write_json
from bitwright.models.encoder import embed_sentences
from bitwright.models.load import load
from bitwright.models.perplexity import packaged_text, perplexity, read_text, text_ids
from bitwright.models.retrieval import embed_pairs, openings, retrieval_drift

RESULTS = Path(__file__).parent / "results" / "outlier_victim_pairs.json"
SPEEDS = RESULTS.with_name("outlier_victim_speed.json")
FORMATS = {
    "ovp4": OutlierVictimPairs(4), "ovp4_flint": OutlierVictimPairs(4, normal="flint"),
    "ovp4_unsigned": OutlierVictimPairs(4, signed=False), "ovp8": OutlierVictimPairs(8),
    "ovp8_e4m3": OutlierVictimPairs(8, exponent_bits=4),
}  # fmt: skip
COLUMNS = (128, 576, 1536, 4096)
WINDOWS, WINDOW = 2, 512
Run = Callable[[Any], Any]


def pairs(scheme: str, weights: int, activations: int | None) -> Callable[[nn.Module, Run], nn.Module]:
    """Ours, or plain integers with the same machinery."""

    def make(model: nn.Module, run: Run) -> nn.Module:
        settings = PairSettings(scheme, search_percent=(25, 1000, 5) if weights == 8 else (75, 250, 2))
        return apply(model, weights, activations, None if activations is None else run, settings)[0]

    return make


def quanto(model: nn.Module, run: Run) -> nn.Module:
    """INT8 on both sides, one scale per input tensor."""
    from optimum.quanto import Calibration, freeze, qint8, quantize

    twin = copy.deepcopy(model)
    quantize(twin, weights=qint8, activations=qint8, exclude="lm_head")
    with torch.no_grad(), Calibration():
        run(twin)
    freeze(twin)
    return twin


def torchao(bits: int) -> Callable[[nn.Module, Run], nn.Module]:
    """INT8 with a scale per token, or INT4 weights alone."""

    def make(model: nn.Module, run: Run) -> nn.Module:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, IntxWeightOnlyConfig, quantize_
        from torchao.quantization.granularity import PerAxis

        twin = copy.deepcopy(model)
        four = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerAxis(0))
        config = Int8DynamicActivationInt8WeightConfig() if bits == 8 else four
        quantize_(twin, config, lambda module, name: isinstance(module, nn.Linear) and not name.endswith("lm_head"))
        return twin

    return make


RECIPES = {
    "W8A8 pairs": pairs("pairs", 8, 8), "W8A8 int8 absmax": pairs("absmax", 8, 8),
    "W8A8 optimum-quanto": quanto, "W8A8 torchao, scale per token": torchao(8),
    "W4A4 pairs": pairs("pairs", 4, 4), "W4A4 int4 clipped": pairs("clipped", 4, 4),
    "W4 pairs": pairs("pairs", 4, None), "W4 int4 clipped": pairs("clipped", 4, None), "W4 torchao": torchao(4),
}  # fmt: skip


def main() -> None:
    """Quantise both models with every recipe and write the results."""
    torch.set_num_threads(2)
    encoder, decoder = load("minilm"), load("smollm2-135m")
    queries, passages = openings(read_text().content, 64)
    calibration = openings(packaged_text("kjv-kings.txt").content, 32)[1]
    reference = embed_pairs(encoder.encoder, encoder.text_tokenizer, queries, passages)
    ids = text_ids(decoder.text_tokenizer, packaged_text("kjv-kings.txt"), WINDOWS * WINDOW + 1)
    other = text_ids(decoder.text_tokenizer, read_text(), WINDOW)
    rows: dict[str, dict[str, float]] = {
        "FP32": {"cosine": 1.0, "perplexity": perplexity(decoder.decoder, ids, window=WINDOW).value}
    }
    missing: dict[str, str] = {}
    for name, make in RECIPES.items():
        try:
            small = make(encoder.encoder, lambda model: embed_sentences(model, encoder.text_tokenizer, calibration))
            start = time.perf_counter()
            large = make(decoder.decoder, lambda model: model.hidden_states(other[None]))
            seconds = time.perf_counter() - start
        except ImportError as error:
            missing[name] = str(error)
            continue
        drift = retrieval_drift(embed_pairs(small, encoder.text_tokenizer, queries, passages), reference)
        score = perplexity(large, ids, window=WINDOW).value
        rows[name] = {"cosine": drift.cosine, "agreement": drift.agreement, "perplexity": score, "quantise_s": seconds}
        print(f"{name:32s} cosine {drift.cosine:.4f}  perplexity {score:12.2f}  in {seconds:.1f} s", flush=True)
    write_json(RESULTS, {"windows": WINDOWS, "rows": rows, "missing": missing})


def least(calls: dict[str, Callable[[], Any]], repeats: int = 5) -> tuple[dict[str, float], dict[str, Any]]:
    """Processor time (s) of each call, in turns, the least of `repeats`; and what they returned."""
    seconds, made = dict.fromkeys(calls, float("inf")), {}
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.thread_time()
            made[name] = call()
            seconds[name] = min(seconds[name], time.thread_time() - start)
    return seconds, made


def speed(values: int) -> None:
    """Values per second of the codec and of the search, normal and heavy-tailed (Student, 4 degrees of freedom)."""
    torch.set_num_threads(1)
    rng, rows = np.random.default_rng(0), []
    for columns in COLUMNS:
        shape = (values // columns, columns)
        drawn = {"normal": rng.normal(size=shape), "heavy-tailed": rng.standard_t(4, shape)}
        for kind, x in ((kind, x.astype(np.float32)) for kind, x in drawn.items()):
            few = np.ascontiguousarray(x[: max(1, 1_000_000 // columns)])
            for name, form in FORMATS.items():
                given = few if form.signed else np.abs(few)
                all_values = x if form.signed else np.abs(x)
                search, scales = least({
                    "bounds": lambda form=form, given=given: form.search(given, errors=False)[0],
                    "exhaustive": lambda form=form, given=given: form.search(given, exhaustive=True, errors=False)[0],
                })  # fmt: skip
                encoded = form.encode(all_values)
                tensor = torch.from_numpy(all_values)
                codec, _ = least({
                    "encode": lambda form=form, x=all_values, scale=encoded.scale: form.encode(x, scale),
                    "decode": lambda form=form, encoded=encoded: form.decode(encoded),
                    "torch": lambda tensor=tensor: tensor.to(torch.float8_e4m3fn),
                })  # fmt: skip
                row: dict[str, Any] = {"format": name, "values": kind, "columns": columns}
                row |= {f"search_{key}_per_s": given.size / value for key, value in search.items()}
                row["search_over_exhaustive"] = search["exhaustive"] / search["bounds"]
                row["same_scales"] = bool(np.array_equal(scales["bounds"], scales["exhaustive"]))
                row |= {f"{key}_per_s": x.size / codec[key] for key in ("encode", "decode")}
                row["encode_over_torch_float8"] = codec["torch"] / codec["encode"]
                rows.append(row)
                print({key: f"{each / 1e6:.0f} M/s" if key.endswith("per_s") else
                       f"{each:.1f}" if isinstance(each, float) else each for key, each in row.items()},
                      flush=True)  # fmt: skip
    write_json(SPEEDS, {"evidence": "executed", "threads": 1, "values": values, "rows": rows})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--speed", action="store_true", help="only the codec and the search for scales")
    parser.add_argument("--values", type=int, default=10_000_000)
    chosen = parser.parse_args()
    if chosen.speed:
        speed(chosen.values)
    else:
        main()
