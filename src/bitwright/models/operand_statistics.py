"""Digit profiles of every product of a real model, taken while it runs on a text, and their use for other networks.

Linear layers give the integers of `models.operands.collect_operands`; the two products of attention give queries, keys,
probabilities and values, quantised as `models.integer` does. Nothing is assumed about a distribution.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.core import cache
from bitwright.core.errors import InputError
from bitwright.core.workload import Kind, Operator
from bitwright.engine.digit_profiles import OperandProfile, measure_profile, profile_from_json
from bitwright.engine.network_cost import OperandStatistics

_VERSION = 3
_TOKENS = 256
_SAMPLE = 256  # rows of an operand looked at


@dataclass(frozen=True)
class ProductProfiles:
    """Profiles of both operands of one product: left (m, k) by rows, right (k, n) by columns.

    `kind` is the product's place in a layer: query, key, value, output, up, down, gate, head, scores or context.
    """

    name: str
    kind: str
    left: OperandProfile
    right: OperandProfile


def model_profiles(
    model: str, encoding: str = "ent", bits: int = 8, group: int = 4, tokens: int = _TOKENS, text: Path | None = None,
    seed: int = 0,
) -> list[ProductProfiles]:  # fmt: skip
    """Profiles of all products of a known model or local weights ("minilm", "smollm2-135m", ..), cached.

    The model runs once in INT8 (`models.integer.scheme`) on the first `tokens` tokens of `text` (default: the text that
    comes with Bitwright); operands of fewer `bits` are quantised to those. Raises InputError for tokens below 2 and
    models that do not run here, and what `models.load.load` raises.
    """
    from bitwright.models.load import weight_paths
    from bitwright.models.perplexity import read_text

    source = read_text(text)
    inputs = {
        "version": _VERSION, "weights": [cache.file_digest(path) for path in weight_paths(model)],
        "text": source.digest, "tokens": tokens, "encoding": encoding, "bits": bits, "group": group, "seed": seed,
    }  # fmt: skip
    stored = cache.get_or_compute(
        "operand-profiles", inputs, lambda: _run(model, encoding, bits, group, tokens, text, seed)
    )
    return [
        ProductProfiles(
            each["name"], each["kind"], profile_from_json(each["left"]), profile_from_json(each["right"])
        )
        for each in stored
    ]  # fmt: skip


def _run(
    model: str, encoding: str, bits: int, group: int, tokens: int, text: Path | None, seed: int
) -> list[dict[str, Any]]:
    from bitwright.models.encoder import Encoder
    from bitwright.models.integer import integer_execution
    from bitwright.models.load import load
    from bitwright.models.onnx_file import OnnxFile
    from bitwright.models.operands import collect_operands
    from bitwright.models.perplexity import read_text, text_ids

    loaded = load(model)
    network = loaded.module
    if isinstance(network, OnnxFile):
        raise InputError(f"{model} is an ONNX file, which is traced and not run; give a model with weights.")
    if isinstance(network, Encoder):
        tokens = min(tokens, network.config.max_positions)
    source = read_text(text)
    ids = text_ids(loaded.text_tokenizer, source, tokens)
    twin = integer_execution(network, bits, bits)
    attention: list[tuple[str, NDArray[np.int8], NDArray[np.int8]]] = []
    for name, module in list(twin.named_modules()):
        if hasattr(module, "attend"):
            module.attend = partial(_recorded, module.attend, name, bits, attention)
    layers = collect_operands(twin, ids[None], rows=_SAMPLE, columns=_SAMPLE, seed=seed)
    found = [(layer.name, layer.activations, np.ascontiguousarray(layer.weights.T)) for layer in layers] + attention
    origin = f"{model}, {len(ids)} tokens of {source.name}"
    profiles = []
    for position, (name, left, right) in enumerate(found):
        sides = {}
        for side, codes in (("left", left), ("right", right)):
            rows = np.sort(np.random.default_rng([seed, position]).permutation(len(codes))[:_SAMPLE])
            named = f"{origin}, {name} {side}"
            sides[side] = measure_profile(codes[rows], encoding, bits, group, named).to_json()
        profiles.append({"name": name, "kind": _kind(name), **sides})
    return profiles


def _recorded(
    attend: Callable[..., Any], name: str, bits: int,
    found: list[tuple[str, NDArray[np.int8], NDArray[np.int8]]], query: Any, key: Any, value: Any, **options: Any,
) -> Any:  # fmt: skip
    """Attention as before; appends the codes of its two products, rows of all heads one under the other."""
    import torch

    from bitwright.arithmetic.quantise import quantise_symmetric

    each = (0, 1, 2)
    shared = query.shape[1] // key.shape[1]
    keys, values = (x.repeat_interleave(shared, dim=1).float() for x in (key, value))
    q, k, v = (quantise_symmetric(x, bits, axis=each) for x in (query.float(), keys, values))
    scores = (q.dequantise() @ k.dequantise().transpose(2, 3)) * query.shape[-1] ** -0.5
    mask = options.get("attn_mask")
    if options.get("is_causal"):
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    p = quantise_symmetric(torch.softmax(scores, -1) * v.scale.transpose(2, 3), bits, axis=each)

    def rows(codes: Any) -> NDArray[np.int8]:
        matrix: NDArray[np.int8] = codes.reshape(-1, codes.shape[-1]).cpu().numpy()
        return matrix

    found.append((f"{name}.scores", rows(q.codes), rows(k.codes)))
    found.append((f"{name}.context", rows(p.codes), rows(v.codes.transpose(2, 3))))
    return attend(query, key, value, **options)


def _kind(name: str) -> str:
    last = name.rpartition(".")[2]
    return {"lm_head": "head"}.get(last, last)


def statistics_of(
    profiles: Sequence[ProductProfiles], fallback: tuple[OperandProfile, OperandProfile] | None = None
) -> OperandStatistics:
    """Profiles of a measured model for the products of any network with layers named alike.

    A product takes the profile of its kind (the last part of its name: query, up, ...; scores and context in
    attention); of several layers, the one whose number is that of the product's layer, counted round when the network
    has more layers than the measured model. A kind that was not measured takes `fallback`.
    The returned function raises InputError for such a product when there is no fallback.
    """
    by_kind: dict[str, list[ProductProfiles]] = {}
    for profile in profiles:
        by_kind.setdefault(profile.kind, []).append(profile)
    memo: dict[tuple[str, int], tuple[OperandProfile, OperandProfile]] = {}

    def find(operator: Operator, index: int) -> tuple[OperandProfile, OperandProfile]:
        if (operator.name, index) not in memo:
            kind = ("scores", "context")[index] if operator.kind is Kind.ATTENTION else _kind(operator.name)
            measured = by_kind.get(kind)
            if measured is None and fallback is None:
                raise InputError(
                    f"No digit profile for {operator.name!r} (kind {kind!r}); measured: {', '.join(sorted(by_kind))}. "
                    "Give a fallback."
                )
            if measured is None:
                assert fallback is not None
                memo[operator.name, index] = fallback
            else:
                chosen = measured[_layer_index(operator.name) % len(measured)]
                memo[operator.name, index] = (chosen.left, chosen.right)
        return memo[operator.name, index]

    return find


def _layer_index(name: str) -> int:
    numbers = [part for part in name.split(".") if part.isdigit()]
    return int(numbers[0]) if numbers else 0


def summary(profiles: Sequence[ProductProfiles]) -> Mapping[str, tuple[float, float, float, float]]:
    """Per kind: mean digits and issue cycles of the left operand, then of the right one."""
    kinds = dict.fromkeys(profile.kind for profile in profiles)
    return {
        kind: (
            float(np.mean([each.left.digits for each in profiles if each.kind == kind])),
            float(np.mean([each.left.issue_cycles for each in profiles if each.kind == kind])),
            float(np.mean([each.right.digits for each in profiles if each.kind == kind])),
            float(np.mean([each.right.issue_cycles for each in profiles if each.kind == kind])),
        )
        for kind in kinds
    }
