"""System 41: K-sort, channel rearrangement for block floating point key caches (arXiv 2403.20137).

The paper's model (Llama2-7B) is not at hand: keys and perplexity are those of SmolLM2-135M (64 channels per head, 3
key-value heads, rotary positions), whose weights were stored in 4 bits before, so that only comparisons mean something.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache as memory
from typing import Any, Literal

from bitwright.core import cache
from bitwright.core.quantity import Evidence, Quantity
from bitwright.reproduce.claims import Claim

STATUS = "complete"
ENTRY_POINTS = (
    "bitwright.arithmetic.formats.shared_exponent.block_floating_point",
    "bitwright.compression.key_channel_sort.k_sort",
    "bitwright.compression.key_channel_sort.key_sqnr_db",
    "bitwright.models.block_floating_cache.BfpKVCache",
    "bitwright.models.block_floating_cache.kv_bytes",
)
_PAPER = "arXiv 2403.20137"
_VERSION = 4
WINDOWS, WINDOW = 8, 512
BLOCKS = (16, 32, 64)
PEERS = ("bfp16_32", "int4/32", "mxfp4", "int8/row")


@memory
def measurements() -> Mapping[str, Any]:
    """Executed on SmolLM2-135M: {"sqnr": {model: {format: [dB by layer-head]}}, "perplexity": {...}, "overlap": x,
    "rank_correlation": x, "spread": {"keys": x, "weights": x}}.

    Models: "unsorted", "permuted" and "pair" (norms of weight rows); permuted with other scores: "scaled" (norms with
    the scale of the norm before), "random" (sizes of keys of random tokens) and "calibrated" (of keys of another text).
    Perplexity by (model, format of the key cache), 8 windows of 512 tokens. Cached by the weights.
    """
    from bitwright.models.load import weight_paths

    digests = [cache.file_digest(path) for path in weight_paths("smollm2-135m")]
    inputs = {"version": _VERSION, "weights": digests, "windows": WINDOWS, "window": WINDOW}
    found: Mapping[str, Any] = cache.get_or_compute("bfp-outliers", inputs, _measure)
    return found


def _measure() -> dict[str, Any]:
    from bitwright.compression.key_channel_sort import (
        attentions,
        channel_rms,
        k_sort,
        key_sqnr_db,
        random_tokens,
        weight_scores,
    )  # fmt: skip
    from bitwright.core.progress import progress
    from bitwright.models.format_execution import FormatAssignment, execute_in
    from bitwright.models.load import load
    from bitwright.models.perplexity import packaged_text, perplexity, read_text, text_ids

    loaded = load("smollm2-135m")
    plain = loaded.decoder
    models: dict[str, Any] = {"unsorted": plain}
    ropes: tuple[Literal["permuted", "pair"], ...] = ("permuted", "pair")
    for rope in ropes:
        models[rope] = k_sort(plain, 16, rope)[0]
    ids = text_ids(loaded.text_tokenizer, packaged_text("kjv-kings.txt"), WINDOWS * WINDOW + 1)
    other = text_ids(loaded.text_tokenizer, read_text(), WINDOW)

    def on(tokens: Any) -> Callable[[Any], Any]:
        return lambda model: [model.hidden_states(part[None]) for part in tokens[: WINDOWS * WINDOW].split(WINDOW)]

    models["scaled"] = k_sort(plain, 16, "permuted", "scaled-norm")[0]
    data_free = random_tokens(plain.config.vocabulary, WINDOW)[0]
    for kind, tokens in (("random", data_free), ("calibrated", other)):
        models[kind] = k_sort(plain, 16, "permuted", "calibrated", on(tokens))[0]
    names = [f"bfp12_{block}" for block in BLOCKS]
    sqnr = {
        kind: {
            name: [float(value) for heads in by_layer.values() for value in heads]
            for name, by_layer in key_sqnr_db(model, [*names, *(PEERS if kind == "unsorted" else ())], on(ids)).items()
        }
        for kind, model in models.items()
    }
    runs = [("unsorted", None), *((kind, name) for kind in models for name in names), *(("unsorted", n) for n in PEERS)]
    scores: dict[str, dict[str, float]] = {kind: {} for kind in models}
    with progress("Perplexity with key caches", len(runs)) as advance:
        for kind, name in runs:
            made = execute_in(models[kind], FormatAssignment(keys=name))
            scores[kind][name or "fp32"] = perplexity(made, ids, window=WINDOW).value
            advance(1)
    first, second = (channel_rms(plain, on(tokens)) for tokens in (ids, other))
    quarter = plain.config.head_dim // 4
    shared = [
        len(set(a.topk(quarter).indices.tolist()) & set(b.topk(quarter).indices.tolist())) / quarter
        for name in first
        for a, b in zip(first[name], second[name], strict=True)
    ]
    norms = {name: weight_scores(attention) for name, attention in attentions(plain)}
    rank = [_rank_correlation(a, b) for name in first for a, b in zip(norms[name], first[name], strict=True)]
    spread = {
        kind: sum(float(row.max() / row.median()) for rows in by_layer.values() for row in rows) / len(rank)
        for kind, by_layer in (("keys", first), ("weights", norms))
    }
    return {
        "sqnr": sqnr, "perplexity": scores, "overlap": sum(shared) / len(shared),
        "rank_correlation": sum(rank) / len(rank), "spread": spread,
    }  # fmt: skip


def _rank_correlation(a: Any, b: Any) -> float:
    """Spearman's coefficient of two vectors without ties."""
    one, two = (each.argsort().argsort().double() for each in (a, b))
    one, two = one - one.mean(), two - two.mean()
    return float((one * two).sum() / (one.square().sum() * two.square().sum()).sqrt())


def _executed(value: float, unit: str, source: str) -> Quantity:
    return Quantity(value, unit, Evidence.EXECUTED, f"SmolLM2-135M, {source}")


def better_heads(block: int, kind: str = "permuted") -> float:
    """Share of layer-heads whose keys have a higher signal-to-noise ratio after sorting, at BFP12 blocks."""
    name = f"bfp12_{block}"
    found = measurements()["sqnr"]
    pairs = list(zip(found["unsorted"][name], found[kind][name], strict=True))
    return float(sum(after > before for before, after in pairs) / len(pairs))


def mean_gain_db(block: int, kind: str = "permuted") -> float:
    """Mean gain in signal-to-noise ratio of a layer-head's keys, dB."""
    name = f"bfp12_{block}"
    found = measurements()["sqnr"]
    pairs = list(zip(found["unsorted"][name], found[kind][name], strict=True))
    return float(sum(after - before for before, after in pairs) / len(pairs))


def perplexity_ratio(block: int, kind: str, against: str) -> float:
    """Perplexity with BFP12 keys of `kind` over that of `against` ("unsorted": same format; "fp32": no format)."""
    found = measurements()["perplexity"]
    base = found["unsorted"]["fp32"] if against == "fp32" else found[against][f"bfp12_{block}"]
    return float(found[kind][f"bfp12_{block}"] / base)


def _memory_ratio() -> Quantity:
    from bitwright.models.block_floating_cache import kv_bytes
    from bitwright.models.configurations import configuration

    config = configuration("llama-2-7b")
    ratio = kv_bytes(config, 4096, 1, "bfp16_64") / kv_bytes(config, 4096, 1, "bfp12_64")
    return Quantity(ratio, "", Evidence.PREDICTED, "exact bytes of codes and exponents, Llama2-7B, 4096 tokens")


def _packed_cache() -> Quantity:
    """Bytes that a packed cache of SmolLM2-135M allocates for 2,048 tokens over those of the formula."""
    from bitwright.models.block_floating_cache import BfpKVCache, kv_bytes
    from bitwright.models.load import load

    config = load("smollm2-135m").decoder.config
    stored = BfpKVCache(config, 1, 2048, "bfp12_32", "bfp12_32").stored_bytes
    return _executed(stored / kv_bytes(config, 2048, 1, "bfp12_32"), "x", f"2,048 tokens in {stored:,} bytes")


def _llama(figure: Callable[[Any], float], unit: str, source: str) -> Quantity:
    from bitwright.models.configurations import configuration

    return Quantity(figure(configuration("llama-2-7b")), unit, Evidence.PREDICTED, source)


def memory_claims() -> tuple[Claim, ...]:
    """Sizes of caches: exact arithmetic on packed codes and exponents, and what a cache really allocates."""
    from bitwright.models.block_floating_cache import kv_bytes, largest_batch

    def size(tokens: int) -> Claim:
        shape = 2 * 32 * 32 * 128 * tokens  # keys and values of 32 layers, 32 heads of 128 channels
        return Claim(
            f"key-value cache of {tokens:,} tokens", "Llama2-7B, BFP12_64, batch 1",
            Quantity(shape * 4.125 / 8, "B", Evidence.PUBLISHED, f"{_PAPER}: p + 8/n bits per element"),
            lambda: _llama(lambda config: kv_bytes(config, tokens, 1, "bfp12_64"), "B", "packed codes and exponents"),
            1e-9,
        )  # fmt: skip

    def batch(name: str, bits: float) -> Claim:
        room = 40e9
        fits = room // (2 * 32 * 32 * 128 * 4096 * bits / 8)
        return Claim(
            f"largest batch of 4,096 tokens, {name}", "Llama2-7B, 40 GB for keys and values",
            Quantity(fits, "sequence", Evidence.PUBLISHED, f"{_PAPER}: p + 8/n bits per element"),
            lambda: _llama(lambda config: largest_batch(config, 4096, room, name), "sequence", "exact bytes"), 0.0,
        )  # fmt: skip

    return (
        Claim("bytes of a packed cache over the formula", "SmolLM2-135M, BFP12_32, 2,048 tokens",
              Quantity(1.0, "x", Evidence.PUBLISHED, f"{_PAPER}: p + 8/n bits per element"), _packed_cache, 0.01),
        Claim("memory of fp16 over a 4-bit mantissa", "Llama2-7B, fp16 over BFP12_64",
              Quantity(16 / 4.125, "x", Evidence.PUBLISHED, f"{_PAPER}: p + 8/n bits per element"),
              lambda: _llama(lambda config: kv_bytes(config, 4096, 1, "fp16") / kv_bytes(config, 4096, 1, "bfp12_64"),
                             "x", "exact bytes, 4096 tokens"), 0.01),
        *(size(tokens) for tokens in (4096, 8192, 16384, 32768)),
        batch("fp16", 16), batch("bfp16_64", 8.125), batch("bfp12_64", 4.125),
    )  # fmt: skip


def dot_product_area(library: str, mantissa_bits: int = 4, block: int = 32) -> Quantity:
    """Area times period of the block dot product with its binary32 sum over that of FP16 multiply-accumulates of the
    same throughput; both one result per cycle, synthesised."""
    from bitwright.engine.libraries import find_library
    from bitwright.engine.rtl.floating_units import BlockDotProduct, HalfMultiplyAccumulate
    from bitwright.engine.standalone_units import unit_gates

    cells = find_library(library)
    ours, peer = (unit_gates(unit, cells) for unit in (BlockDotProduct(mantissa_bits, block), HalfMultiplyAccumulate()))
    periods = [report.period_s or report.longest_path_s for report in (ours, peer)]
    ratio = ours.area_um2 * periods[0] / (block * peer.area_um2 * periods[1])
    text = f"areas {ours.area_um2:.4g} and {block} x {peer.area_um2:.4g} um2, {periods[0] * 1e9:.3g} and "
    return Quantity(ratio, "x", Evidence.SYNTHESISED, f"{text}{periods[1] * 1e9:.3g} ns")


def _qualitative(value: float) -> Quantity:
    return Quantity(value, "", Evidence.PUBLISHED, f"{_PAPER}, stated without a figure")


def claims() -> tuple[Claim, ...]:
    """Memory, gains by block size, perplexity and the stability of large channels."""
    small = "SmolLM2-135M has heads of 64 channels, Llama2-7B of 128: its n = 64 is our n = 32."
    text = f"{WINDOWS} windows of {WINDOW} tokens"

    def heads(block: int, kind: str, scores: str, explanation: str) -> Claim:
        return Claim(
            f"layer-heads that gain, n = {block}, {scores}", "K cache BFP12, SmolLM2-135M, permuted RoPE",
            _qualitative(1.0), lambda: _executed(better_heads(block, kind), "", f"keys of {text}, 90 layer-heads"), 0.2,
            explanation,
        )  # fmt: skip

    norms = (
        "Rows of key weights have almost the same norm, and it says little about the keys (see spread and rank below): "
        "what makes a key channel large is the direction that inputs have. The scale of the norm before is a part of "
        "it that weights show; sizes of the keys of random tokens show it without any text. " + small
    )

    def against(block: int) -> Claim:
        return Claim(
            f"perplexity sorted over unsorted, n = {block}", f"K cache BFP12, {text}; below 1 is a gain",
            _qualitative(1.0), lambda: _executed(perplexity_ratio(block, "permuted", "unsorted"), "", text), None,
            "The paper shows a gain and gives no figure that this catalogue could read; " + small,
        )  # fmt: skip

    def other(block: int, kind: str, scores: str, explanation: str) -> Claim:
        return Claim(
            f"perplexity sorted over unsorted, n = {block}, {scores}", f"K cache BFP12, {text}; not in the paper",
            _qualitative(1.0), lambda: _executed(perplexity_ratio(block, kind, "unsorted"), "", text), None,
            explanation,
        )  # fmt: skip

    keys = (
        "Less noise in the keys is not less noise in the scores q.k: this order gathers the channels with large keys, "
        "which mostly have large queries too, under coarse steps, and what it makes finer counts little."
    )

    def loss(block: int) -> Claim:
        return Claim(
            f"perplexity over unquantised, n = {block}, sorted", f"K cache BFP12, {text}", _qualitative(1.0),
            lambda: _executed(perplexity_ratio(block, "permuted", "fp32"), "", text), 0.05,
            "'Without significant accuracy loss' is read as at most 5 %. A model of 135 M parameters with heads of 64 "
            "channels loses more to 4-bit keys than one of 7 B with heads of 128.",
        )  # fmt: skip

    def rank() -> Claim:
        return Claim(
            "rank correlation of weight norms and key channels", "Spearman, mean of 90 heads", _qualitative(1.0),
            lambda: _executed(measurements()["rank_correlation"], "", text), None,
            "1 if the norms of weights ordered the channels as the keys do.",
        )  # fmt: skip

    def spread(what: str) -> Claim:
        return Claim(
            f"largest over median channel, {what}", "mean of 90 heads", _qualitative(1.0),
            lambda: _executed(measurements()["spread"][what], "x", text), None, "1 without outliers.",
        )  # fmt: skip

    def gates(library: str) -> Claim:
        return Claim(
            "BFP12 dot product over FP16 multiply-accumulates, area x period", f"n = 32, binary32 sums, {library}",
            _qualitative(1.0), lambda: dot_product_area(library), None,
            "The paper has no gates. The mapped unit is simulated against the exact dot product in the tests.", "lower",
        )  # fmt: skip

    return (
        gates("osu018"), gates("predictive-28nm"),
        Claim("memory of an 8-bit over a 4-bit mantissa", "Llama2-7B, BFP16_64 over BFP12_64",
              Quantity(2.0, "", Evidence.PUBLISHED, f"{_PAPER}, abstract"), _memory_ratio, 0.02,
              "Exponents are shared by 64 values in both: (8 + 1/8) / (4 + 1/8)."),
        *memory_claims(),
        Claim("noise energy sorted over unsorted, n = head", "K cache BFP12, one block per head",
              Quantity(1.0, "", Evidence.PUBLISHED, f"{_PAPER}, results: no gain at n = 128 = head_dim"),
              lambda: _executed(10 ** (-mean_gain_db(64) / 10), "", "keys of 512 tokens, n = 64 = head_dim"), 1e-4),
        *(heads(block, "permuted", "weight norms", norms) for block in (16, 32)),
        *(heads(block, "scaled", "norms of scaled weights", norms) for block in (16, 32)),
        *(heads(block, "random", "keys of random tokens", "") for block in (16, 32)),
        *(heads(block, "calibrated", "keys of another text", "") for block in (16, 32)),
        against(16), against(32),
        *(other(block, "scaled", "norms of scaled weights", "") for block in (16, 32)),
        *(other(block, "random", "keys of random tokens", keys) for block in (16, 32)),
        *(other(block, "calibrated", "keys of another text", keys) for block in (16, 32)),
        loss(16), loss(32), rank(), spread("keys"), spread("weights"),
        Claim("large channels are those of any input", "top quarter of key channels on two texts, shared share",
              _qualitative(1.0), lambda: _executed(measurements()["overlap"], "", "1 Kings against 1 Samuel"), 0.2),
    )  # fmt: skip
