"""Real networks in outlier-victim pairs: SmolLM2-135M and MiniLM beside plain integers of the same granularity.

Weights have a scale per output channel, inputs one fixed scale per layer, found on one window of another text. The
weights of SmolLM2-135M were stored in 4 bits before, so that only comparisons of its perplexity mean something.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache as memory
from typing import Any

from bitwright.compression.outlier_victim_pairs import PairSettings
from bitwright.core import cache

_VERSION = 2
WINDOWS, WINDOW = 4, 512
QUERIES = 64
WIDE_SEARCH = (25, 1000, 5)
# the inputs of these layers hold values of 3,000 beside a median of 0.07, always in the first token
MASSIVE = ("layers.11.feed_forward.down", "layers.28.feed_forward.down")
# name -> weight bits, activation bits, settings, layers that stay in floating point
RECIPES: dict[str, tuple[int, int | None, PairSettings, tuple[str, ...]]] = {
    "W8A8 pairs e4m3": (8, 8, PairSettings(), ()),
    "W8A8 pairs e2m5": (8, 8, PairSettings(eight_bit_exponent=2), ()),
    "W8A8 pairs e4m3, search to 1,000 %": (8, 8, PairSettings(search_percent=WIDE_SEARCH), ()),
    "W8A8 pairs e4m3, search to 1,000 %, two layers in FP32": (
        8, 8, PairSettings(search_percent=WIDE_SEARCH), MASSIVE),
    "W8A8 pairs, exponents chosen, search to 1,000 %": (
        8, 8, PairSettings(eight_bit_exponent=None, search_percent=WIDE_SEARCH), ()),
    "W8A8 pairs e4m3, search to 1,000 %, gate and up in FP32": (
        8, 8, PairSettings(search_percent=WIDE_SEARCH), ("feed_forward.gate", "feed_forward.up")),
    "W8 pairs e4m3": (8, None, PairSettings(), ()),
    "W8A8 int8 absmax": (8, 8, PairSettings("absmax"), ()),
    "W8A8 int8 clipped": (8, 8, PairSettings("clipped"), ()),
    "W4A4 pairs": (4, 4, PairSettings(), ()),
    "W4A4 pairs, integers": (4, 4, PairSettings(normal="int"), ()),
    "W4A4 int4 absmax": (4, 4, PairSettings("absmax"), ()),
    "W4A4 int4 clipped": (4, 4, PairSettings("clipped"), ()),
    "W4 pairs": (4, None, PairSettings(), ()),
    "W4 int4 absmax": (4, None, PairSettings("absmax"), ()),
    "W4 int4 clipped": (4, None, PairSettings("clipped"), ()),
}  # fmt: skip
BLOCK_FLOATS = {"W8A8 bfp16_32": "bfp16_32", "W4A4 bfp12_32": "bfp12_32"}


@memory
def perplexities() -> Mapping[str, float]:
    """Perplexity of SmolLM2-135M by recipe and "FP32"; executed, each cached by the weights and the recipe."""
    from bitwright.core.progress import progress

    names = ("FP32", *RECIPES, *BLOCK_FLOATS)
    with progress("Perplexity in outlier-victim pairs", len(names)) as advance:
        found = {}
        for name in names:
            found[name] = recipe_perplexity(name)
            advance(1)
    return found


@memory
def recipe_perplexity(name: str) -> float:
    """Of one recipe, of one of `BLOCK_FLOATS`, or of "FP32"."""
    from bitwright.models.load import weight_paths

    digests = [cache.file_digest(path) for path in weight_paths("smollm2-135m")]
    recipe = repr(RECIPES.get(name, BLOCK_FLOATS.get(name)))
    inputs = {"version": _VERSION, "weights": digests, "windows": WINDOWS, "window": WINDOW, "recipe": recipe}
    found: float = cache.get_or_compute("olive-perplexity", inputs, lambda: _perplexity(name))
    return found


@memory
def _decoder_and_texts() -> tuple[Any, Any, Any]:
    """SmolLM2-135M, ids of the text that is scored, ids of the other one that calibrates."""
    from bitwright.models.load import load
    from bitwright.models.perplexity import packaged_text, read_text, text_ids

    loaded = load("smollm2-135m")
    ids = text_ids(loaded.text_tokenizer, packaged_text("kjv-kings.txt"), WINDOWS * WINDOW + 1)
    return loaded.decoder, ids, text_ids(loaded.text_tokenizer, read_text(), WINDOW)


def _perplexity(name: str) -> float:
    from bitwright.compression.outlier_victim_pairs import apply
    from bitwright.models.format_execution import FormatAssignment, execute_in
    from bitwright.models.perplexity import perplexity

    model, ids, other = _decoder_and_texts()
    if name in BLOCK_FLOATS:
        model = execute_in(model, FormatAssignment(BLOCK_FLOATS[name], BLOCK_FLOATS[name]))
    elif name != "FP32":
        weights, activations, settings, kept = RECIPES[name]
        run = None if activations is None else lambda network: network.hidden_states(other[None])
        model, _ = apply(model, weights, activations, run, settings, keep_float=("lm_head", *kept))
    return perplexity(model, ids, window=WINDOW).value


@memory
def drifts() -> Mapping[str, Any]:
    """Of MiniLM by recipe: {"cosine": x, "recall": x, "reference_recall": x, "agreement": x}; executed, cached."""
    from bitwright.models.load import weight_paths

    digests = [cache.file_digest(path) for path in weight_paths("minilm")]
    inputs = {"version": _VERSION, "weights": digests, "queries": QUERIES, "recipes": [*map(repr, RECIPES.items())]}
    found: Mapping[str, Any] = cache.get_or_compute("olive-retrieval", inputs, _drifts)
    return found


def _drifts() -> dict[str, Any]:
    from bitwright.compression.outlier_victim_pairs import apply
    from bitwright.models.encoder import embed_sentences
    from bitwright.models.load import load
    from bitwright.models.perplexity import packaged_text, read_text
    from bitwright.models.retrieval import embed_pairs, openings, retrieval_drift

    loaded = load("minilm")
    model, tokenizer = loaded.encoder, loaded.text_tokenizer
    queries, passages = openings(read_text().content, QUERIES)
    calibration = openings(packaged_text("kjv-kings.txt").content, 32)[1]
    reference = embed_pairs(model, tokenizer, queries, passages)
    found = {}
    for name, (weights, activations, settings, kept) in RECIPES.items():
        if kept:
            continue
        run = None if activations is None else lambda model: embed_sentences(model, tokenizer, calibration)
        made, _ = apply(model, weights, activations, run, settings)
        found[name] = vars(retrieval_drift(embed_pairs(made, tokenizer, queries, passages), reference))
    return found
