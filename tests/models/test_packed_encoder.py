"""The encoder without padding gives what the padded encoder gives."""

import pytest
import torch

from bitwright.core.errors import InputError
from bitwright.models.encoder import Encoder, EncoderConfig, embed_sentences
from bitwright.models.load import load
from bitwright.models.packed_encoder import PackedEncoder


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    return Encoder(EncoderConfig(100, 48, 3, 4, 96, 64)).eval()


@pytest.mark.parametrize("lengths", [[7, 1, 20, 13], [20, 20], [0, 5, 0], [1]])
def test_real_tokens_are_those_of_the_padded_encoder(small, lengths):
    longest = max(lengths)
    ids = torch.randint(0, 100, (len(lengths), longest), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
    with torch.inference_mode():
        expected = small(ids, mask)
    found = PackedEncoder(small)(ids, mask)
    assert found.shape == expected.shape
    assert (found - expected)[mask].abs().max() < 1e-5
    assert (found[~mask] == 0).all()
    full = PackedEncoder(small)(ids)
    with torch.inference_mode():
        assert (full - small(ids)).abs().max() < 1e-5


def test_sentences_of_minilm_have_the_same_embeddings():
    loaded = load("minilm")
    sentences = [
        "A package.",
        "tools to build and check many kinds of packages " * 9,
        "fonts",
        "",
        "games for children",
    ]
    plain = embed_sentences(loaded.encoder, loaded.text_tokenizer, sentences)
    packed = embed_sentences(
        loaded.encoder, loaded.text_tokenizer, sentences, run=PackedEncoder(loaded.encoder)
    )  # fmt: skip
    assert (plain - packed).abs().max() < 1e-5


def test_bad_input(small):
    packed = PackedEncoder(small)
    ids = torch.zeros(2, 5, dtype=torch.int64)
    with pytest.raises(InputError, match="does not fit"):
        packed(ids, torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(InputError, match="bool"):
        packed(ids, torch.ones(2, 5))
    with pytest.raises(InputError, match="64 positions"):
        packed(torch.zeros(1, 65, dtype=torch.int64))
    with pytest.raises(InputError, match="float32"):
        PackedEncoder(Encoder(EncoderConfig(10, 8, 1, 2, 8)).double())
