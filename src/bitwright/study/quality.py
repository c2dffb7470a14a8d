"""The model part of a study: perplexity in each format, and the words its layers multiply. Executed, then cached."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bitwright.arithmetic import encodings
from bitwright.arithmetic.statistics import from_value_histogram
from bitwright.core import cache
from bitwright.core.quantity import Evidence, Quantity
from bitwright.study.file import FormatSection, ModelSection
from bitwright.study.result import LayerDigits, Quality

if TYPE_CHECKING:
    from bitwright.models.decoder import Decoder

# Part of every cache key: increase when what is executed or stored here changes.
_VERSION = 4
_ENCODINGS = ("mbe", "ent", "csd", "twos-complement")
_SAMPLED_ROWS = _SAMPLED_COLUMNS = 64
_OPERAND_TOKENS = 256
_EXECUTION = {
    "fp32": "32-bit floating point",
    "int8": "int8 x int8 -> int32 in every product; weights scaled per channel, activations per token",
}


@dataclass(frozen=True)
class Operands:
    """Words of one layer's operands: sampled activations (rows, k) and weights (k, columns), histograms of all that are
    INT8."""

    layer: str
    activations: NDArray[np.integer[Any]]
    weights: NDArray[np.integer[Any]]
    activation_histogram: NDArray[np.int64]
    weight_histogram: NDArray[np.int64]
    macs: int  # multiply-accumulates per token


def measure_quality(section: ModelSection, folder: Path) -> tuple[Quality, ...]:
    """Perplexity of the model in every format of the study; a text path is relative to `folder`."""
    found = []
    inputs = _inputs(section, folder)
    for formats in section.formats:
        value = cache.get_or_compute(
            "perplexity",
            {**inputs, "format": _key(formats), "window": section.window, "tokens": section.tokens},
            lambda formats=formats: _run_perplexity(section, folder, formats),  # type: ignore[misc]
        )
        source = f"{inputs['text_name']}, {value['windows']} windows of {value['window']} tokens"
        perplexity = Quantity(value["perplexity"], "", Evidence.EXECUTED, source)
        execution = _EXECUTION[formats.name] if formats.built_in else f"{formats.assignment.name}; sums in float32"
        found.append(Quality(formats.name, perplexity, value["tokens"], execution))
    return tuple(found)


def _key(formats: FormatSection) -> str | dict[str, Any]:
    """What a cached figure depends on: how the operands are executed, not what that is called."""
    return formats.name if formats.built_in else formats.model_dump(exclude={"name"})


def sample_operands(section: ModelSection, folder: Path, formats: FormatSection, seed: int) -> tuple[Operands, ...]:
    """The words of every linear layer's operands, taken while the model runs on the text in those formats."""
    inputs = {**_inputs(section, folder), "format": _key(formats), "seed": seed, "tokens": _OPERAND_TOKENS}
    stored = cache.get_or_compute("operands", inputs, lambda: _run_operands(section, folder, formats, seed))
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


def _run_perplexity(section: ModelSection, folder: Path, formats: FormatSection) -> Mapping[str, Any]:
    from bitwright.models.load import load
    from bitwright.models.perplexity import perplexity, read_text, text_ids

    loaded = load(model_source(section, folder))
    ids = text_ids(loaded.text_tokenizer, read_text(_text_path(section, folder)), section.tokens + 1)
    model = loaded.decoder if formats.name == "fp32" else _executed_in(loaded.decoder, formats)
    report = perplexity(model, ids, window=section.window, description=f"Perplexity of {section.name}, {formats.name}")
    return {
        "perplexity": report.value, "tokens": report.tokens, "windows": report.windows, "window": report.window
    }  # fmt: skip


def _executed_in(model: Decoder, formats: FormatSection) -> Decoder:
    from bitwright.models.format_execution import execute_in
    from bitwright.models.integer import integer_execution

    return integer_execution(model) if formats.name == "int8" else execute_in(model, formats.assignment)


def _run_operands(section: ModelSection, folder: Path, formats: FormatSection, seed: int) -> list[dict[str, Any]]:
    from bitwright.models.load import load
    from bitwright.models.operands import collect_operands, collect_words
    from bitwright.models.perplexity import read_text, text_ids

    loaded = load(model_source(section, folder))
    ids = text_ids(loaded.text_tokenizer, read_text(_text_path(section, folder)), _OPERAND_TOKENS)
    rows, columns = _SAMPLED_ROWS, _SAMPLED_COLUMNS
    if formats.name == "int8":
        model = _executed_in(loaded.decoder, formats)
        layers = collect_operands(model, ids[None], rows=rows, columns=columns, seed=seed)
    else:
        layers = collect_words(
            loaded.decoder, formats.assignment, ids[None], rows=rows, columns=columns, seed=seed
        )  # fmt: skip
    return [
        {
            "layer": layer.name,
            "activations": _pack(layer.activations),
            "weights": _pack(layer.weights),
            "activation_histogram": [] if layer.activation_histogram is None else layer.activation_histogram.tolist(),
            "weight_histogram": [] if layer.weight_histogram is None else layer.weight_histogram.tolist(),
            "macs": layer.n * layer.k,
        }
        for layer in layers
    ]


def _pack(values: NDArray[np.integer[Any]]) -> dict[str, Any]:
    data = base64.b64encode(values.tobytes()).decode()
    return {"shape": list(values.shape), "type": values.dtype.str, "bytes": data}


def _unpack(stored: Mapping[str, Any]) -> NDArray[np.integer[Any]]:
    return np.frombuffer(base64.b64decode(stored["bytes"]), stored["type"]).reshape(stored["shape"])
