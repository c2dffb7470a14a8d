"""Outlier-victim pairs beside optimum-quanto and torchao: accuracy of MiniLM and SmolLM2-135M, time to quantise.

    pip install --no-deps --target peers optimum-quanto torchao
    PYTHONPATH=peers python benchmarks/outlier_victim_pairs.py

Weights have one scale per output channel everywhere. Inputs: pairs and optimum-quanto have one fixed scale per layer,
from the same calibration texts; torchao has one per token, found at run time, which is finer. Writes
benchmarks/results/outlier_victim_pairs.json; peers that are not installed are left out, and named.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bitwright.compression.outlier_victim_pairs import PairSettings, apply
from bitwright.core.files import write_json
from bitwright.models.encoder import embed_sentences
from bitwright.models.load import load
from bitwright.models.perplexity import packaged_text, perplexity, read_text, text_ids
from bitwright.models.retrieval import embed_pairs, openings, retrieval_drift

RESULTS = Path(__file__).parent / "results" / "outlier_victim_pairs.json"
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


if __name__ == "__main__":
    main()
