"""Perplexity of a decoder over a text, executed.

exp of the mean negative log-likelihood (natural logarithm) per token; Jelinek et al. (1977).
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional

from bitwright.core.errors import BitwrightError, InputError
from bitwright.core.progress import progress
from bitwright.core.quantity import Evidence, Quantity
from bitwright.models.decoder import Decoder, check_ids

DEFAULT_TEXT = "kjv-samuel.txt"


@dataclass(frozen=True)
class Text:
    """A text with the name it is reported under and the SHA-256 of its UTF-8 bytes."""

    name: str
    content: str
    digest: str


def read_text(path: Path | str | None = None) -> Text:
    """The text in a UTF-8 file, or the default text that comes with Bitwright (see models/texts/README.md).

    Raises InputError when the file cannot be read, is not UTF-8, or is empty.
    """
    if path is None:
        name = DEFAULT_TEXT
        data = (resources.files("bitwright.models") / "texts" / name).read_bytes()
    else:
        name = str(path)
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise InputError(f"Cannot read the text {path}: {error.strerror or error}.") from error
    try:
        content = data.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"The text {name} is not UTF-8 (byte {error.start}); convert it first.") from None
    if not content.strip():
        raise InputError(f"The text {name} is empty.")
    return Text(name, content, hashlib.sha256(data).hexdigest())


def packaged_text(name: str) -> Text:
    """A text that comes with Bitwright, by its file name; see models/texts/README.md."""
    place = resources.files("bitwright.models") / "texts" / name
    return replace(read_text(Path(str(place))), name=name)


def text_ids(tokenizer: Tokenizer, text: Text, limit: int | None = None) -> Tensor:
    """Token ids (tokens,) of the first `limit` tokens of a text (default all), special tokens not added."""
    if limit is not None and limit < 2:
        raise InputError(f"{limit} tokens asked for; at least 2 are needed to predict one from another.")
    ids = tokenizer.encode(text.content, add_special_tokens=False).ids
    return torch.tensor(ids[:limit], dtype=torch.long)


@dataclass(frozen=True)
class PerplexityReport:
    """What was run and what came out.

    `tokens` predictions were scored in `windows` windows of up to `window` input tokens whose starts lie `stride`
    apart; `nll_nats` is the sum of their negative log-likelihoods.
    """

    tokens: int
    windows: int
    window: int
    stride: int
    nll_nats: float

    @property
    def value(self) -> float:
        """Perplexity: exp(nll_nats / tokens)."""
        return math.exp(self.nll_nats / self.tokens)

    @property
    def quantity(self) -> Quantity:
        """The perplexity as an executed quantity; its source says tokens, windows and stride."""
        source = f"{self.tokens} tokens in {self.windows} windows of {self.window}, stride {self.stride}"
        return Quantity(self.value, "", Evidence.EXECUTED, source)


def perplexity(
    model: Decoder,
    ids: Tensor,
    *,
    window: int = 512,
    stride: int | None = None,
    batch: int = 2,
    description: str = "perplexity",
) -> PerplexityReport:
    """Perplexity of `model` on token ids (tokens,): every id but the first is predicted once from those before it.

    A window holds `window` input tokens and predicts each one's successor; windows start every `stride` tokens
    (default: `window`, no overlap), and where windows overlap only what was not scored before counts. The sums do not
    depend on `batch`, up to float rounding (about 1e-6 relative, also between numbers of threads).

    Raises InputError for sizes that do not fit the model or the ids, BitwrightError when the model's output is not
    finite.
    """
    stride = window if stride is None else stride
    if not 1 <= window <= model.config.max_positions:
        raise InputError(f"A window of {window} tokens asked for; the model takes 1 to {model.config.max_positions}.")
    if not 1 <= stride <= window or batch < 1:
        raise InputError(f"Stride {stride} and batch {batch} given; expected 1 <= stride <= {window} and batch >= 1.")
    if ids.dim() != 1 or len(ids) < 2:
        raise InputError(f"Token ids of shape {tuple(ids.shape)} given; expected (tokens,) with at least 2.")
    check_ids(ids[None], model.config.vocabulary)
    spans = _spans(len(ids) - 1, window, stride)
    total, scored = 0.0, 0
    with torch.inference_mode(), progress(description, len(spans)) as advance:
        at = 0
        while at < len(spans):
            size = spans[at][1] - spans[at][0]
            group = [span for span in spans[at : at + batch] if span[1] - span[0] == size]
            inputs = torch.stack([ids[first:end] for first, end, _ in group])
            states = model.hidden_states(inputs)
            kept = torch.cat([row[fresh - first :] for row, (first, _, fresh) in zip(states, group, strict=True)])
            targets = torch.cat([ids[fresh + 1 : end + 1] for _, end, fresh in group])
            for part, wanted in zip(
                torch.split(kept, 512), torch.split(targets, 512), strict=True
            ):  # bounds the logits' memory
                losses = functional.cross_entropy(model.lm_head(part).float(), wanted, reduction="none")
                total += float(losses.double().sum())
            scored += len(targets)
            at += len(group)
            advance(len(group))
    if not math.isfinite(total):
        raise BitwrightError("The model's logits are not finite, so it has no perplexity on this text.")
    return PerplexityReport(scored, len(spans), window, stride, total)


def _spans(inputs: int, window: int, stride: int) -> list[tuple[int, int, int]]:
    """(first input, end, first input not scored before) of each window over `inputs` positions."""
    spans, done = [], 0
    for first in range(0, inputs, stride):
        end = min(first + window, inputs)
        spans.append((first, end, done))
        done = end
        if end == inputs:
            break
    return spans
