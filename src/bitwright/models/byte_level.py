"""Byte-level BPE tokenizers from a token table and a merge table, as GGUF files carry them."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from bitwright.core.errors import InputError

# Names llama.cpp gives to the split applied to text before BPE ("tokenizer.ggml.pre").
_GPT2 = ("default", "gpt-2", "gpt2")
_SINGLE_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell")
_LLAMA3 = ("llama-bpe", "llama3", "llama-v3")
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _pre_tokenizer(split: str, source: str) -> pre_tokenizers.PreTokenizer:
    if split in _GPT2:
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if split in _SINGLE_DIGITS:
        steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    elif split in _LLAMA3:
        steps = [
            pre_tokenizers.Split(Regex(_LLAMA3_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    else:
        known = ", ".join(_GPT2 + _SINGLE_DIGITS + _LLAMA3)
        raise InputError(f"{source} splits text before BPE by the rule {split!r}; supported rules are {known}.")
    return pre_tokenizers.Sequence(steps)


def byte_level_tokenizer(
    tokens: Sequence[str],
    merges: Sequence[str],
    split: str,
    *,
    special: Sequence[str] = (),
    user_defined: Sequence[str] = (),
    begin: str | None = None,
    source: str = "the tokenizer",
) -> Tokenizer:
    """A byte-level BPE tokenizer: `tokens[i]` has id i, `merges` are pairs "left right" in order of priority.

    `split` names the rule that cuts text into words before BPE; `special` and `user_defined` tokens are matched whole
    in the text; `begin` is put before every text.

    Raises InputError when a token repeats, a merge is not a pair, or the rule is unknown; messages name `source`.
    """
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise InputError(f"{source}: the token table holds {len(tokens) - len(vocabulary)} repeated tokens.")
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    try:
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=split in _LLAMA3))
    except Exception as error:  # the tokenizers library raises a bare Exception for a merge of unknown tokens
        raise InputError(f"{source}: the merge table does not fit the token table: {error}") from None
    tokenizer.pre_tokenizer = _pre_tokenizer(split, source)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in user_defined])
    if begin is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", pair=f"{begin} $A {begin} $B", special_tokens=[(begin, vocabulary[begin])]
        )
    return tokenizer
