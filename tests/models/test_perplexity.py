"""Perplexity against its definition."""

import math
from pathlib import Path

import pytest
import torch
from tiny_decoder import TINY

from bitwright.core.errors import BitwrightError, InputError
from bitwright.models.decoder import Decoder
from bitwright.models.integer import integer_execution
from bitwright.models.perplexity import perplexity, read_text, text_ids

IDS = torch.randint(0, TINY.vocabulary, (60,), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("window", "stride"), [(59, 59), (16, 16), (16, 5), (7, 1), (64, 20)])
@pytest.mark.parametrize("batch", [1, 3])
def test_every_token_is_predicted_once_from_its_window(tiny: Decoder, window: int, stride: int, batch: int) -> None:
    report = perplexity(tiny, IDS, window=window, stride=stride, batch=batch)
    total, done, windows = 0.0, 0, 0
    with torch.inference_mode():
        while done < 59:
            first = windows * stride
            end = min(first + window, 59)
            log_probabilities = tiny(IDS[None, first:end]).double().log_softmax(-1)[0]
            for position in range(done, end):
                total -= float(log_probabilities[position - first, IDS[position + 1]])
            done, windows = end, windows + 1
    assert (report.tokens, report.windows) == (59, windows)
    assert report.nll_nats == pytest.approx(total, rel=1e-5)
    assert report.value == pytest.approx(math.exp(total / 59), rel=1e-5)


def test_a_model_that_knows_nothing(tiny: Decoder) -> None:
    tiny.embedding.weight.zero_()
    assert perplexity(tiny, IDS, window=20).value == pytest.approx(TINY.vocabulary, rel=1e-6)
    tiny.norm.weight.fill_(float("nan"))
    with pytest.raises(BitwrightError, match="not finite"):
        perplexity(tiny, IDS, window=20)


def test_smollm2_reads_the_default_text_also_in_integers(smollm2) -> None:
    ids = text_ids(smollm2.tokenizer, read_text(), 385)
    real = perplexity(smollm2.decoder, ids, window=128)
    integers = perplexity(integer_execution(smollm2.decoder), ids, window=128)
    assert real.tokens == integers.tokens == 384
    assert 5 < real.value < 60  # far from 49,152, the value of a model that knows nothing
    assert integers.value == pytest.approx(real.value, rel=0.12)
    assert integers.value != real.value
    assert str(real.quantity.evidence) == "executed"


def test_bad_requests_are_refused(tiny: Decoder, tmp_path: Path) -> None:
    for arguments, message in [
        ({"window": 65}, "1 to 64"),
        ({"window": 0}, "1 to 64"),
        ({"window": 8, "stride": 9}, "Stride 9"),
        ({"window": 8, "batch": 0}, "batch 0"),
    ]:
        with pytest.raises(InputError, match=message):
            perplexity(tiny, IDS, **arguments)
    with pytest.raises(InputError, match="at least 2"):
        perplexity(tiny, IDS[:1], window=8)
    with pytest.raises(InputError, match="vocabulary"):
        perplexity(tiny, torch.tensor([1, 97]), window=8)
    with pytest.raises(InputError, match="Cannot read the text"):
        read_text(tmp_path / "absent.txt")
    (tmp_path / "bad.txt").write_bytes(b"caf\xe9")
    with pytest.raises(InputError, match="not UTF-8"):
        read_text(tmp_path / "bad.txt")
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(InputError, match="is empty"):
        read_text(tmp_path / "empty.txt")
