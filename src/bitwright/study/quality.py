"""The model part of a study: perplexity in each format, and the integers its layers multiply. Executed, then cached."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.arithmetic import encodings
from bitwright.arithmetic.statistics import from_value_histogram
from bitwright.core import cache
from bitwright.core.quantity import Evidence, Quantity
from bitwright.study.file import ModelSection
from bitwright.study.result import LayerDigits, Quality

# Part of every cache key: increase when what is executed or stored here changes.
_VERSION = 3
_ENCODINGS = ("mbe", "ent", "csd", "twos-complement")
_SAMPLED_ROWS = _SAMPLED_COLUMNS = 64
_OPERAND_TOKENS = 256
_EXECUTION = {
    "fp32": "32-bit floating point",
    "int8": "int8 x int8 -> int32 in every product; weights scaled per channel, activations per token",
}


@dataclass(frozen=True)
class Operands:
    """Integer operands of one layer: sampled activations (rows, k) and weights (k, columns), histograms of all."""

    layer: str
    activations: NDArray[np.int8]
    weights: NDArray[np.int8]
    activation_histogram: NDArray[np.int64]
    weight_histogram: NDArray[np.int64]
    macs: int  # multiply-accumulates per token


def measure_quality(section: ModelSection, folder: Path) -> tuple[Quality, ...]:
    """Perplexity of the model in every format of the study; a text path is relative to `folder`."""
    found = []
    inputs = _inputs(section, folder)
    for number_format in section.formats:
        value = cache.get_or_compute(
            "perplexity",
            {**inputs, "format": number_format, "window": section.window, "tokens": section.tokens},
            lambda number_format=number_format: _run_perplexity(section, folder, number_format),  # type: ignore[misc]
        )
        source = f"{inputs['text_name']}, {value['windows']} windows of {value['window']} tokens"
        perplexity = Quantity(value["perplexity"], "", Evidence.EXECUTED, source)
        found.append(Quality(number_format, perplexity, value["tokens"], _EXECUTION[number_format]))
    return tuple(found)


def sample_operands(section: ModelSection, folder: Path, seed: int) -> tuple[Operands, ...]:
    """The integer operands of every linear layer, taken while the INT8 model runs on the text."""
    inputs = {**_inputs(section, folder), "seed": seed, "tokens": _OPERAND_TOKENS}
    stored = cache.get_or_compute("operands", inputs, lambda: _run_operands(section, folder, seed))
    return tuple(
        Operands(
            entry["layer"],
            _unpack(entry["activations"]),
            _unpack(entry["weights"]),
            np.array(entry["activation_histogram"], np.int64),
            np.array(entry["weight_histogram"], np.int64),
            entry["macs"],
        )
        for entry in stored
    )


def layer_digits(operands: tuple[Operands, ...]) -> tuple[LayerDigits, ...]:
    """Mean non-zero digits per value of each layer's weights and activations, by encoding."""

    def means(histogram: NDArray[np.int64]) -> dict[str, float]:
        return {name: from_value_histogram(histogram, encodings.get(name)).mean for name in _ENCODINGS}

    return tuple(
        LayerDigits(entry.layer, means(entry.weight_histogram), means(entry.activation_histogram)) for entry in operands
    )


def digit_histograms(operands: tuple[Operands, ...]) -> dict[str, dict[str, tuple[float, ...]]]:
    """Share of values by number of non-zero digits over all layers, for weights and activations."""
    totals = {
        "weights": sum(entry.weight_histogram for entry in operands),
        "activations": sum(entry.activation_histogram for entry in operands),
    }
    return {
        operand: {
            name: tuple(from_value_histogram(histogram, encodings.get(name)).shares.tolist())
            for name in ("mbe", "ent", "csd")
        }
        for operand, histogram in totals.items()
    }


def model_source(section: ModelSection, folder: Path) -> str:
    """The model's name, or its path, which is relative to the study file."""
    from bitwright.models.load import KNOWN_MODELS

    inside = folder / section.name
    return str(inside) if section.name not in KNOWN_MODELS and inside.exists() else section.name


def _inputs(section: ModelSection, folder: Path) -> dict[str, Any]:
    """What the executed figures depend on, found without loading the model."""
    from bitwright.models.load import weight_paths
    from bitwright.models.perplexity import read_text

    text = read_text(_text_path(section, folder))
    source = model_source(section, folder)
    paths = (*weight_paths(source), *sorted(Path(source).glob("*.json")))  # a folder's sizes and tokenizer
    weights = [cache.file_digest(path) for path in paths]
    return {"version": _VERSION, "weights": weights, "text": text.digest, "text_name": text.name}


def _text_path(section: ModelSection, folder: Path) -> Path | None:
    return None if section.text == "default" else folder / section.text


def _run_perplexity(section: ModelSection, folder: Path, number_format: str) -> Mapping[str, Any]:
    from bitwright.models.integer import integer_execution
    from bitwright.models.load import load
    from bitwright.models.perplexity import perplexity, read_text, text_ids

    loaded = load(model_source(section, folder))
    ids = text_ids(loaded.text_tokenizer, read_text(_text_path(section, folder)), section.tokens + 1)
    model = loaded.decoder if number_format == "fp32" else integer_execution(loaded.decoder)
    report = perplexity(model, ids, window=section.window, description=f"Perplexity of {section.name}, {number_format}")
    return {
        "perplexity": report.value, "tokens": report.tokens, "windows": report.windows, "window": report.window
    }  # fmt: skip


def _run_operands(section: ModelSection, folder: Path, seed: int) -> list[dict[str, Any]]:
    from bitwright.models.integer import integer_execution
    from bitwright.models.load import load
    from bitwright.models.operands import collect_operands
    from bitwright.models.perplexity import read_text, text_ids

    loaded = load(model_source(section, folder))
    ids = text_ids(loaded.text_tokenizer, read_text(_text_path(section, folder)), _OPERAND_TOKENS)
    model = integer_execution(loaded.decoder)
    layers = collect_operands(model, ids[None], rows=_SAMPLED_ROWS, columns=_SAMPLED_COLUMNS, seed=seed)
    return [
        {
            "layer": layer.name,
            "activations": _pack(layer.activations),
            "weights": _pack(layer.weights),
            "activation_histogram": layer.activation_histogram.tolist(),
            "weight_histogram": layer.weight_histogram.tolist(),
            "macs": layer.n * layer.k,
        }
        for layer in layers
    ]


def _pack(values: NDArray[np.int8]) -> dict[str, Any]:
    return {"shape": list(values.shape), "bytes": base64.b64encode(values.tobytes()).decode()}


def _unpack(stored: Mapping[str, Any]) -> NDArray[np.int8]:
    return np.frombuffer(base64.b64decode(stored["bytes"]), np.int8).reshape(stored["shape"])
