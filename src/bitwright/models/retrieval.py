"""How far sentence embeddings move, and whether retrieval still finds the same text, executed on a packaged text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional

from bitwright.core.errors import InputError
from bitwright.models.encoder import Encoder, embed_sentences


@dataclass(frozen=True)
class RetrievalDrift:
    """Of a changed encoder against the original one, over queries and passages.

    `cosine`: mean cosine between both embeddings of a text; `recall`: share of queries whose own passage comes first;
    `reference_recall`: that of the original; `agreement`: share of queries for which both put the same passage first.
    """

    cosine: float
    recall: float
    reference_recall: float
    agreement: float


def openings(content: str, count: int, words: int = 12) -> tuple[list[str], list[str]]:
    """Queries and passages: the first third of a sentence, and the whole sentence, for the first `count` sentences of
    at least `words` words.

    Raises InputError for a text with fewer sentences.
    """
    sentences = [sentence.split() for sentence in content.replace("\n", " ").split(". ")]
    chosen = [sentence for sentence in sentences if len(sentence) >= words][:count]
    if len(chosen) < count or count < 2:
        raise InputError(f"{count} sentences of {words} words asked for; the text holds {len(chosen)}.")
    return [" ".join(each[: len(each) // 3]) for each in chosen], [" ".join(each) for each in chosen]


def embed_pairs(model: Encoder, tokenizer: Tokenizer, queries: Sequence[str], passages: Sequence[str]) -> Tensor:
    """Unit vectors (2, queries, hidden) of both. Raises InputError unless there are as many passages as queries."""
    if len(queries) != len(passages):
        raise InputError(f"{len(queries)} queries and {len(passages)} passages given; query i belongs to passage i.")
    return torch.stack([embed_sentences(model, tokenizer, list(texts)) for texts in (queries, passages)])


def retrieval_drift(changed: Tensor, reference: Tensor) -> RetrievalDrift:
    """From `embed_pairs` of the changed and the original encoder, (2, queries, hidden) each."""
    if changed.shape != reference.shape or changed.dim() != 3 or changed.shape[0] != 2:
        raise InputError(f"Embeddings of {tuple(changed.shape)} and {tuple(reference.shape)} given; expected equal.")
    first = [(each[0] @ each[1].T).argmax(-1) for each in (changed, reference)]
    own = torch.arange(changed.shape[1])
    recall, original = (float((best == own).double().mean()) for best in first)
    cosine = float(functional.cosine_similarity(changed.double(), reference.double(), dim=-1).mean())
    return RetrievalDrift(cosine, recall, original, float((first[0] == first[1]).double().mean()))
