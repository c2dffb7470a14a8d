"""MiniLM against transformers: token ids, hidden states, sentence vectors."""

import pytest
import torch

from bitwright.core.errors import InputError
from bitwright.models.encoder import EncoderConfig, embed_sentences, encoder_config_from_json
from bitwright.models.load import LoadedModel, load

SENTENCES = [
    "A man is playing a guitar.",
    "Someone plays an instrument, in 1999; naïve café — 日本!",
    "The accelerator multiplies small integers in a systolic array of processing elements.",
    "word " * 400,
]


@pytest.fixture(scope="module")
def minilm() -> LoadedModel:
    return load("minilm")


def test_hidden_states_and_vectors_equal_transformers(minilm: LoadedModel) -> None:
    from transformers import AutoModel, AutoTokenizer

    folder = minilm.files[0].parent
    tokenizer = AutoTokenizer.from_pretrained(folder)
    theirs = AutoModel.from_pretrained(folder).eval()
    batch = tokenizer(SENTENCES, padding=True, truncation=True, max_length=256, return_tensors="pt")
    for sentence, ids in zip(SENTENCES[:3], batch["input_ids"], strict=False):
        mine = minilm.tokenizer.encode(sentence).ids
        assert mine == ids[: len(mine)].tolist()
    mask = batch["attention_mask"].bool()
    with torch.inference_mode():
        expected = theirs(**batch).last_hidden_state
        ours = minilm.encoder(batch["input_ids"], mask)
    torch.testing.assert_close(ours[mask], expected[mask], atol=1e-4, rtol=1e-4)
    pooled = (expected * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    vectors = embed_sentences(minilm.encoder, minilm.tokenizer, SENTENCES, batch=3)
    torch.testing.assert_close(vectors, pooled / pooled.norm(dim=1, keepdim=True), atol=1e-4, rtol=1e-4)


def test_paraphrases_lie_closer(minilm: LoadedModel) -> None:
    a, b, c = embed_sentences(
        minilm.encoder,
        minilm.tokenizer,
        ["How do I cook rice?", "What is the way to prepare rice?", "The stock market fell sharply."],
    )
    assert float(a @ b) > float(a @ c) + 0.3


def test_bad_requests_are_refused(minilm: LoadedModel) -> None:
    with pytest.raises(InputError, match="0 sentences"):
        embed_sentences(minilm.encoder, minilm.tokenizer, [])
    with pytest.raises(InputError, match="3 to 512"):
        embed_sentences(minilm.encoder, minilm.tokenizer, ["a"], max_tokens=513)
    with pytest.raises(InputError, match="heads"):
        EncoderConfig(vocabulary=10, hidden=10, layers=1, heads=3, feed_forward=4)
    with pytest.raises(InputError, match="vocab_size"):
        encoder_config_from_json({"model_type": "bert"}, "x")
