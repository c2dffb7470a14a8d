"""Rules that cut text into words before BPE, and tokens added around and within it."""

import pytest
import regex
from tokenizers import pre_tokenizers

from bitwright.core.errors import InputError
from bitwright.models.byte_level import byte_level_tokenizer

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
SAMPLE = "It's 12345 o'CLOCK,\n\n\tnaïve  日本語 x=3.14;   end's\r\n ٣٤½ "
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def words(split: str) -> list[str]:
    tokenizer = byte_level_tokenizer(ALPHABET, [], split)
    return [SAMPLE[first:last] for _, (first, last) in tokenizer.pre_tokenizer.pre_tokenize_str(SAMPLE)]


def test_gpt2_rule() -> None:
    assert words("gpt-2") == regex.findall(GPT2, SAMPLE)


def test_single_digits_rule() -> None:
    parts = regex.findall(r"\p{N}|\P{N}+", SAMPLE)
    assert words("smollm") == [word for part in parts for word in regex.findall(GPT2, part)]


def test_llama3_rule_groups_three_digits() -> None:
    found = words("llama-bpe")
    assert "".join(found) == SAMPLE
    assert found[:6] == ["It", "'s", " ", "123", "45", " o"]
    assert found[6:9] == ["'CLOCK", ",\n\n", "\tnaïve"]


def test_special_user_and_begin_tokens() -> None:
    tokens = [*ALPHABET, "ab", "<s>", "<tool>"]
    tokenizer = byte_level_tokenizer(tokens, ["a b"], "gpt-2", special=["<s>"], user_defined=["<tool>"], begin="<s>")
    begin, tool, pair = 257, 258, 256
    assert tokenizer.encode("ab<tool>ab<s>").ids == [begin, pair, tool, pair, begin]
    assert tokenizer.encode("ab", add_special_tokens=False).ids == [pair]
    assert tokenizer.get_vocab_size() == 259


def test_unknown_rules_are_refused() -> None:
    with pytest.raises(InputError, match=r"the file splits text .* 'poro'; supported rules are default"):
        byte_level_tokenizer(ALPHABET, [], "poro", source="the file")
