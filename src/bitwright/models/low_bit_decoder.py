"""A Llama-like decoder on weights in few bits, executed by one native kernel from token ids to logits.

Every matrix of a layer holds codes of 1 to 4 or 8 bits, w = scale * code + minimum for every 32 inputs of a row: the
codes of a GGUF file as they are stored, or weights rounded to nearest. Activations are rounded to int8 in the same
groups before each product, as llama.cpp does; norms, rotations, attention, SwiGLU and sums are float32, the cache
float16 or float32. A prompt runs through the same products, 32 tokens at a time, with the same bits as token by token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from tokenizers import Tokenizer

from bitwright import _native
from bitwright.core.errors import BitwrightError, InputError
from bitwright.kernels.threads import thread_count, usable_path
from bitwright.kernels.work import Cost, Rates, Work, predict
from bitwright.models.decoder import Decoder, DecoderConfig, check_shapes, parameter_shapes, rotary_tables
from bitwright.models.gguf import GgufFile, decoder_tensors, read_gguf, tokenizer_from_gguf
from bitwright.models.load import load, weight_paths
from bitwright.models.low_bit_codes import GROUP, LowBitCodes, round_to_codes, stored_codes
from bitwright.models.perplexity import PerplexityReport

PATHS = ("vnni", "avx2", "portable")
_UNIT = 32  # rows that go to one thread
_POSITIONS = 2048


class LowBitDecoder:
    """The network and its cache of one sequence. Made by `from_gguf` or `from_decoder`.

    `capacity` positions fit the cache (default: 2048, or as many as the model has). `threads` and `path` ("vnni",
    "avx2", "portable") may be changed at any time; logits are the same bits for any number of threads.
    """

    def __init__(
        self,
        config: DecoderConfig,
        norm: Callable[[str], NDArray[np.float32]],
        codes: Callable[[str], LowBitCodes],
        *,
        capacity: int | None = None,
        cache: Literal["float16", "float32"] = "float16",
        threads: int | None = None,
        path: str | None = None,
    ) -> None:
        """`norm(name)` and `codes(name)` give the parameters by their names in `Decoder`; rows of query and key
        projections with the halves of every head interleaved, as in GGUF files.

        Raises InputError for widths that are not multiples of 32, a capacity beyond the model's positions, and
        unknown caches, paths and numbers of threads.
        """
        widths = (config.hidden, config.heads * config.head_dim, config.kv_heads * config.head_dim, config.feed_forward)
        if any(width % GROUP for width in widths):
            raise InputError(f"Widths {widths} of a decoder given; low-bit weights have groups of {GROUP} inputs.")
        capacity = min(_POSITIONS, config.max_positions) if capacity is None else capacity
        if not 1 <= capacity <= config.max_positions:
            raise InputError(f"A cache of {capacity} positions asked for; the model has 1 to {config.max_positions}.")
        if cache not in ("float16", "float32"):
            raise InputError(f"Caches are float16 or float32, not {cache!r}.")
        self.config, self.capacity, self.cache = config, capacity, cache
        self.threads = thread_count(threads)
        self.path = usable_path(path, PATHS, _native.low_bit_rows_path(), "low-bit products")
        cosines, sines = (table[:, : config.head_dim // 2].numpy().copy()
                          for table in rotary_tables(config, torch.arange(capacity)))  # fmt: skip
        self._native = _native.LlamaDecoder(
            config.vocabulary, config.hidden, config.layers, config.heads, config.kv_heads, config.head_dim,
            config.feed_forward, config.norm_eps, cache == "float16", cosines, sines,
        )  # fmt: skip
        for name in parameter_shapes(config):
            owner, _, kind = name.removesuffix(".weight").rpartition(".")
            layer = int(owner.split(".")[1]) if owner else 0
            if kind.endswith("norm"):
                self._native.set_norm(kind, layer, np.ascontiguousarray(norm(name), np.float32))
            else:
                found = codes(name)
                minimums = None if found.minimums is None else found.minimums.view(np.uint16)
                self._native.set_matrix(kind, layer, found.codes, found.scales.view(np.uint16), minimums, found.bits)

    @property
    def length(self) -> int:
        """Tokens that the cache holds."""
        return self._native.length

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that every token reads: codes, scales and minimums, norms."""
        return self._native.weight_bytes

    def reset(self, length: int = 0) -> None:
        """Forget all but the first `length` tokens. Raises InputError for more than there are."""
        if not 0 <= length <= self.length:
            raise InputError(f"The cache holds {self.length} tokens; cannot keep {length}.")
        self._native.truncate(length)

    def forward(self, ids: ArrayLike, *, every: bool = False) -> NDArray[np.float32]:
        """Append token ids (tokens,) and give logits (vocabulary,) of the last, or (tokens, vocabulary) of `every` one.

        Raises InputError for no ids, ids outside the vocabulary, and more tokens than the cache has room for;
        BitwrightError when the logits are not finite.
        """
        given = _checked_ids(ids, self.config.vocabulary)
        if len(given) > self.capacity - self.length:
            raise InputError(
                f"{len(given)} tokens after {self.length} exceed the cache of {self.capacity} positions; make a "
                "decoder of more capacity, or reset it."
            )
        logits = np.empty((len(given) if every else 1, self.config.vocabulary), np.float32)
        self._native.forward(given, self.path, self.threads, logits)
        if not _native.all_finite(logits.reshape(-1)):
            raise BitwrightError("The model's logits are not finite.")
        return logits if every else logits[0]

    def work(self, context: int) -> Work:
        """Counts of one token after `context` others: int8 products with every weight, float32 products with the
        cache, and the bytes of both."""
        config = self.config
        products = config.parameters - config.hidden * (2 * config.layers + 1)
        if not config.tied_embeddings:
            products -= config.vocabulary * config.hidden  # the embedding, of which a token reads one row
        cached = config.layers * (context + 1) * config.head_dim
        item = 2 if self.cache == "float16" else 4
        return Work(
            {"matrix int8": 2.0 * products, "fp32": 4.0 * cached * config.heads},
            {"memory": self.weight_bytes + 2.0 * cached * config.kv_heads * item},
            pieces=config.hidden // _UNIT,
        )

    def predict(self, rates: Rates, context: int) -> Cost:
        """Seconds of one token after `context` others; evidence: predicted."""
        return predict(self.work(context), rates, self.threads)


def _checked_ids(ids: ArrayLike, vocabulary: int) -> NDArray[np.int64]:
    found = np.asarray(ids)
    if found.ndim != 1 or not found.size or found.dtype.kind not in "iu":
        raise InputError(f"Token ids of shape {found.shape}, {found.dtype} given; expected integers (tokens,).")
    low, high = int(found.min()), int(found.max())
    if low < 0 or high >= vocabulary:
        raise InputError(f"Token ids from {low} to {high} given; the vocabulary has ids 0 to {vocabulary - 1}.")
    return np.ascontiguousarray(found, np.int64)


def from_gguf(file: GgufFile, bits: int | None = None, group: int = GROUP, **options: Any) -> LowBitDecoder:
    """The decoder of a GGUF file with the codes it stores (Q4_0, Q4_1, Q8_0), or rounded again to `bits` bits in
    groups of `group` inputs; embedding and head then get 8 bits, or keep their Q8_0. `options` as in `LowBitDecoder`.

    Raises InputError for tensors that are missing, of other shapes, or stored in another type when `bits` is None.
    """
    config, names = decoder_tensors(file)
    shapes = {ours: file.tensors[theirs].shape for ours, theirs in names.items() if theirs in file.tensors}
    check_shapes(parameter_shapes(config), shapes, str(file.path))

    def codes(name: str) -> LowBitCodes:
        table = not name.startswith("layers.")
        if bits is None or (table and file.tensors[names[name]].type.name == "Q8_0"):
            return stored_codes(file, names[name])
        return round_to_codes(file.read(names[name]), 8 if table else bits, GROUP if table else group)

    return LowBitDecoder(config, lambda name: file.read(names[name]), codes, **options)


def from_decoder(model: Decoder, bits: int = 4, group: int = GROUP, **options: Any) -> LowBitDecoder:
    """`model` with the matrices of its layers rounded to nearest in `bits` bits, embedding and head in 8."""
    config, parameters = model.config, dict(model.named_parameters())

    def codes(name: str) -> LowBitCodes:
        weights = parameters[name].detach().float().cpu()
        if name.endswith(("query.weight", "key.weight")):  # from the order of halves to neighbouring pairs
            halves = weights.view(-1, 2, config.head_dim // 2, config.hidden)
            weights = halves.transpose(1, 2).reshape(weights.shape)
        table = not name.startswith("layers.")
        return round_to_codes(weights.numpy(), 8 if table else bits, GROUP if table else group)

    return LowBitDecoder(config, lambda name: parameters[name].detach().float().cpu().numpy(), codes, **options)


@dataclass(frozen=True)
class TextDecoder:
    """A low-bit decoder with its tokenizer and the tokens that end a text."""

    decoder: LowBitDecoder
    tokenizer: Tokenizer
    stop: frozenset[int]


def load_low_bit(
    name_or_path: str | Path, bits: int | None = None, group: int = GROUP, **options: Any
) -> TextDecoder:  # fmt: skip
    """A known model, GGUF file or Hugging Face folder as a low-bit decoder; `bits` None keeps the codes of a GGUF file.

    Raises as `load`, `from_gguf` and `from_decoder`, and InputError for a folder without `bits`.
    """
    paths = weight_paths(name_or_path)
    if paths[0].suffix == ".gguf":
        file = read_gguf(paths[0])
        end = file.metadata.get("tokenizer.ggml.eos_token_id")
        stop = frozenset({end} if isinstance(end, int) else ())
        return TextDecoder(from_gguf(file, bits, group, **options), tokenizer_from_gguf(file), stop)
    if bits is None:
        raise InputError(f"{name_or_path} stores no low-bit codes; say how many bits its weights are rounded to.")
    loaded = load(name_or_path)
    ends = (loaded.text_tokenizer.token_to_id(token) for token in ("<|im_end|>", "<|endoftext|>", "</s>"))
    return TextDecoder(
        from_decoder(loaded.decoder, bits, group, **options),
        loaded.text_tokenizer,
        frozenset(end for end in ends if end is not None),
    )


def generate(
    decoder: LowBitDecoder,
    ids: Sequence[int],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    seed: int = 0,
    stop: frozenset[int] = frozenset(),
) -> Iterator[int]:
    """Token ids that continue `ids`, one by one, up to `max_new_tokens` or one of `stop`, which is given too.

    The cache is emptied first. Temperature 0 takes the likeliest token; above, tokens are drawn from
    softmax(logits / temperature) by a generator seeded with `seed`. Raises InputError, before anything runs, for an
    empty prompt, ids outside the vocabulary, more positions than the cache has, and negative numbers.
    """
    prompt = _checked_ids(ids, decoder.config.vocabulary)
    if not 0 <= temperature < math.inf or max_new_tokens < 0:
        raise InputError(f"Temperature {temperature} and {max_new_tokens} new tokens given; both must be 0 or more.")
    if len(prompt) + max_new_tokens > decoder.capacity:
        raise InputError(
            f"{len(prompt)} + {max_new_tokens} tokens exceed the cache of {decoder.capacity} positions; ask for fewer, "
            "or make a decoder of more capacity."
        )
    return _generate(decoder, prompt, max_new_tokens, temperature, seed, stop)


def _generate(
    decoder: LowBitDecoder, prompt: NDArray[np.int64], count: int, temperature: float, seed: int, stop: frozenset[int]
) -> Iterator[int]:
    decoder.reset()
    generator = np.random.default_rng(seed)
    step = prompt
    for _ in range(count):
        logits = decoder.forward(step)
        if temperature == 0:
            token = int(logits.argmax())
        else:
            weights = np.exp((logits.astype(np.float64) - logits.max()) / temperature).cumsum()
            token = int(np.searchsorted(weights, generator.random() * weights[-1], side="right"))
        yield token
        if token in stop:
            return
        step = np.array([token])


def perplexity(decoder: LowBitDecoder, ids: ArrayLike, *, window: int = 512) -> PerplexityReport:
    """Perplexity over token ids (tokens,) in windows that do not overlap; as `models.perplexity.perplexity`.

    The cache is used and left empty. Raises InputError for a window that does not fit the cache or fewer than two ids.
    """
    given = _checked_ids(ids, decoder.config.vocabulary)
    if not 1 <= window <= decoder.capacity or len(given) < 2:
        raise InputError(
            f"{len(given)} tokens in windows of {window} asked for; expected at least 2, in windows of 1 to "
            f"{decoder.capacity}."
        )
    total, windows = 0.0, 0
    for first in range(0, len(given) - 1, window):
        inputs = given[first : min(first + window, len(given) - 1)]
        decoder.reset()
        logits = torch.from_numpy(decoder.forward(inputs, every=True))
        targets = torch.from_numpy(given[first + 1 : first + 1 + len(inputs)])
        total += float(torch.nn.functional.cross_entropy(logits, targets, reduction="none").double().sum())
        windows += 1
    decoder.reset()
    return PerplexityReport(len(given) - 1, windows, window, window, total)
