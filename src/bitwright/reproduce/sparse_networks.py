"""Networks for block-sparse inference: an encoder trained on digits and pruned in blocks of several shapes, and MiniLM
pruned in (4, 1) blocks while it learns from the original, then run on block-sparse int8 products."""

from __future__ import annotations

from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

from bitwright.core import cache
from bitwright.reproduce.handwritten_digits import TESTED, handwritten_digits

_VERSION = 2
BLOCKS = ((4, 1), (1, 1), (4, 4))
EPOCHS, BATCH = 60, 64
STEPS, SENTENCES, TOKENS = 240, 16, 40


def digit_accuracies(sparsity: float = 0.9, seed: int = 0) -> dict[str, float]:
    """Accuracy on the held-out digits: dense, and after pruning in blocks of each of `BLOCKS` ("4x1", ...) while
    training goes on for as long again ("longer" is dense training for as long); executed, cached."""
    inputs = {"version": _VERSION, "sparsity": sparsity, "seed": seed, "blocks": BLOCKS, "epochs": EPOCHS}
    found: dict[str, float] = cache.get_or_compute("block-pruned-digits", inputs, lambda: _digits(sparsity, seed))
    return found


def _digits(sparsity: float, seed: int) -> dict[str, float]:
    import copy

    import torch
    from torch import nn
    from torch.nn import functional

    from bitwright.compression.block_pruning import BlockPruning
    from bitwright.core.progress import progress
    from bitwright.models.encoder import EncoderConfig, EncoderLayer

    pixels, labels = handwritten_digits(seed)
    x, y = torch.from_numpy(pixels).view(-1, 8, 8), torch.from_numpy(labels)
    config = EncoderConfig(vocabulary=1, hidden=64, layers=2, heads=4, feed_forward=128)

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.start, self.places = nn.Linear(8, 64), nn.Parameter(torch.randn(8, 64) * 0.1)
            self.layers, self.head = nn.ModuleList(EncoderLayer(config) for _ in range(2)), nn.Linear(64, 10)

        def forward(self, rows: Any) -> Any:
            states = self.start(rows) + self.places
            for layer in self.layers:
                states = layer(states, None)
            return self.head(states.mean(1))

    def train(model: Any, epochs: int, pruning: Any) -> float:
        generator = torch.Generator().manual_seed(seed)
        optimiser = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, epochs * ((len(x) - TESTED) // BATCH))
        for _ in range(epochs):
            order = TESTED + torch.randperm(len(x) - TESTED, generator=generator)
            for at in range(0, len(order) - BATCH + 1, BATCH):
                chosen = order[at : at + BATCH]
                optimiser.zero_grad()
                torch.autograd.backward(functional.cross_entropy(model(x[chosen]), y[chosen]))
                optimiser.step()
                schedule.step()
                if pruning is not None:
                    pruning.step()
        with torch.no_grad():
            return float((model.eval()(x[:TESTED]).argmax(-1) == y[:TESTED]).double().mean())

    torch.manual_seed(seed)
    steps = EPOCHS * ((len(x) - TESTED) // BATCH)
    with progress("Digits pruned in blocks", len(BLOCKS) + 2) as advance:
        dense = Classifier()
        found = {"dense": train(dense, EPOCHS, None)}
        advance(1)
        found["longer"] = train(copy.deepcopy(dense), EPOCHS, None)
        advance(1)
        for block in BLOCKS:
            model = copy.deepcopy(dense)
            pruning = BlockPruning(model, block, sparsity, 0, steps * 2 // 3, every=10, keep=("start", "head"))
            found[f"{block[0]}x{block[1]}"] = train(model, EPOCHS, pruning)
            advance(1)
    return found


def minilm_figures(sparsity: float = 0.8) -> dict[str, float]:
    """MiniLM pruned in (4, 1) blocks over `STEPS` steps in which it learns the original's states on one book, measured
    on another: cosine to the original and retrieval of the pruned network in float32 and of its int8 codes, and of
    codes without pruning; executed, cached by the weights."""
    from bitwright.models.load import weight_paths
    from bitwright.models.perplexity import packaged_text

    inputs = {
        "version": _VERSION, "weights": [cache.file_digest(path) for path in weight_paths("minilm")],
        "texts": [packaged_text(name).digest for name in ("kjv-kings.txt", "kjv-samuel.txt")],
        "sparsity": sparsity, "steps": STEPS, "batch": [SENTENCES, TOKENS],
    }  # fmt: skip
    found: dict[str, float] = cache.get_or_compute("block-pruned-minilm", inputs, lambda: _minilm(sparsity))
    return found


def token_batch(tokenizer: Any, sentences: list[str], most: int = 128) -> tuple[Any, Any]:
    """Token ids (sentences, tokens) and their mask."""
    import torch

    ids = [tokenizer.encode(sentence).ids[:most] for sentence in sentences]
    longest = max(map(len, ids))
    rows = torch.tensor([each + [0] * (longest - len(each)) for each in ids])
    return rows, torch.arange(longest) < torch.tensor([len(each) for each in ids])[:, None]


def _minilm(sparsity: float) -> dict[str, float]:
    import copy

    import torch

    from bitwright.compression.block_pruning import BlockPruning
    from bitwright.core.progress import progress
    from bitwright.models.block_sparse_encoder import BlockSparseEncoder
    from bitwright.models.encoder import Encoder, mean_pool
    from bitwright.models.load import load
    from bitwright.models.perplexity import packaged_text
    from bitwright.models.retrieval import embed_pairs, openings, retrieval_drift

    loaded = load("minilm")
    teacher, tokenizer = loaded.module, loaded.tokenizer
    assert isinstance(teacher, Encoder)
    assert tokenizer is not None
    lines = [line for line in packaged_text("kjv-kings.txt").content.replace("\n", " ").split(". ") if len(line) > 20]
    queries, passages = openings(packaged_text("kjv-samuel.txt").content, 64)
    student = copy.deepcopy(teacher).train()
    for layer in student.layers:
        layer.requires_grad_(True)
    trained = [each for each in student.parameters() if each.requires_grad]
    optimiser = torch.optim.AdamW(trained, 3e-4, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-4, STEPS, pct_start=0.1)
    pruning = BlockPruning(student, (4, 1), sparsity, 0, STEPS * 2 // 3, every=5)
    generator = np.random.default_rng(0)
    with progress("MiniLM pruned in blocks", STEPS) as advance:
        for _ in range(STEPS):
            chosen = [lines[i] for i in generator.integers(0, len(lines), SENTENCES)]
            ids, mask = token_batch(tokenizer, chosen, TOKENS)
            with torch.no_grad():
                wanted = teacher(ids, mask)
            states = student(ids, mask)
            cosine = torch.nn.functional.cosine_similarity(mean_pool(states, mask), mean_pool(wanted, mask), dim=-1)
            loss = torch.nn.functional.mse_loss(states[mask], wanted[mask]) + (1 - cosine).mean()
            optimiser.zero_grad()
            torch.autograd.backward(loss)
            optimiser.step()
            schedule.step()
            pruning.step()
            advance(1)
    student.eval().requires_grad_(False)
    ids, mask = token_batch(tokenizer, lines[:48])
    found: dict[str, float] = {}
    reference = embed_pairs(teacher, tokenizer, queries, passages)
    networks: dict[str, Any] = {
        "float": student, "int8": BlockSparseEncoder.from_encoder(student, ids, mask),
        "dense int8": BlockSparseEncoder.from_encoder(teacher, ids, mask, most_fill=1.0),
    }  # fmt: skip
    for name, network in networks.items():
        drift = retrieval_drift(embed_pairs(network, tokenizer, queries, passages), reference)
        found |= {f"{name} cosine": drift.cosine, f"{name} recall": drift.recall, f"{name} agreement": drift.agreement}
    found["recall"] = drift.reference_recall
    return found


def minilm_times(sparsity: float = 0.8, sentences: int = 8, repeats: int = 9, threads: int = 1) -> dict[str, float]:
    """Median seconds of a batch of sentences of one book, interleaved: torch float32 with padding, sentence by sentence
    (no padding), block products without and with pruned blocks. Pruned at once: times do not depend on the values."""
    import copy

    import torch

    from bitwright.compression.block_pruning import prune_blocks
    from bitwright.models.block_sparse_encoder import BlockSparseEncoder
    from bitwright.models.encoder import Encoder
    from bitwright.models.load import load
    from bitwright.models.perplexity import packaged_text
    from bitwright.models.retrieval import openings

    loaded = load("minilm")
    encoder = loaded.module
    assert isinstance(encoder, Encoder)
    passages = openings(packaged_text("kjv-samuel.txt").content, max(sentences, 2))[1][:sentences]
    ids, mask = token_batch(loaded.tokenizer, passages)
    pruned = copy.deepcopy(encoder)
    prune_blocks(pruned, (4, 1), sparsity)
    dense = BlockSparseEncoder.from_encoder(encoder, ids, mask, most_fill=1.0)
    sparse = BlockSparseEncoder.from_encoder(pruned, ids, mask)
    lengths = [int(each) for each in mask.sum(1)]

    def one_by_one() -> None:
        for row, length in zip(ids, lengths, strict=True):
            encoder(row[None, :length])

    sides: dict[str, Any] = {
        "float32": lambda: encoder(ids, mask), "float32, no padding": one_by_one, "int8": lambda: dense(ids, mask),
        "int8, pruned": lambda: sparse(ids, mask),
    }  # fmt: skip
    before, found = torch.get_num_threads(), {name: [] for name in sides}  # type: ignore[var-annotated]
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            for side in sides.values():
                side()
            for _ in range(repeats):
                for name, side in sides.items():
                    start = perf_counter()
                    side()
                    found[name].append(perf_counter() - start)
    finally:
        torch.set_num_threads(before)
    return {name: median(times) for name, times in found.items()}


def language_perplexities() -> dict[str, float]:
    """Perplexity of SmolLM2-135M, whose linear layers but the head lose 50 to 80 % of their weights by magnitude or by
    weight times input ("magnitude 50 %", ...), without training after it, and "whole"; 2 windows of 512 tokens of one
    book, inputs measured on another; executed, cached."""
    from bitwright.models.load import weight_paths
    from bitwright.models.perplexity import packaged_text

    inputs = {
        "version": _VERSION, "weights": [cache.file_digest(path) for path in weight_paths("smollm2-135m")],
        "texts": [packaged_text(name).digest for name in ("kjv-kings.txt", "kjv-samuel.txt")],
    }  # fmt: skip
    found: dict[str, float] = cache.get_or_compute("unstructured-pruned-smollm2", inputs, _language)
    return found


def _language() -> dict[str, float]:
    import copy

    from bitwright.compression.unstructured_pruning import input_sizes, prune_unstructured
    from bitwright.models.load import load
    from bitwright.models.perplexity import packaged_text, perplexity, text_ids

    loaded = load("smollm2-135m")
    ids = text_ids(loaded.text_tokenizer, packaged_text("kjv-kings.txt"), 1025)
    other = text_ids(loaded.text_tokenizer, packaged_text("kjv-samuel.txt"), 512)
    found = {"whole": perplexity(loaded.decoder, ids, description="Perplexity, whole").value}
    sizes = input_sizes(loaded.decoder, other[None], keep=("lm_head",))
    for sparsity in (0.5, 0.7, 0.8):
        for score, given in (("magnitude", None), ("weight times input", sizes)):
            model = copy.deepcopy(loaded.decoder)
            prune_unstructured(model, sparsity, given, keep=("lm_head",))
            name = f"{score} {100 * sparsity:.0f} %"
            found[name] = perplexity(model, ids, description=f"Perplexity, {name}").value
    return found
