"""K-sort: logits stay, weights come back, and errors fall as predicted; the packed cache against the format."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from bitwright.arithmetic import formats
from bitwright.compression.key_channel_sort import (
    PermutedRotary,
    block_energy,
    fold,
    k_sort,
    key_sqnr_db,
    observe_keys,
    partners,
    random_tokens,
    sort_channels,
    sort_pairs,
    weight_scores,
)
from bitwright.core.errors import InputError
from bitwright.kernels.block_floating_attention import decode_attention
from bitwright.models.block_floating_cache import BfpKVCache, kv_bytes, largest_batch
from bitwright.models.configurations import configuration
from bitwright.models.decoder import Decoder, DecoderConfig, KeyValueCache, generate, rotary_tables, rotate
from bitwright.models.encoder import Encoder, EncoderConfig
from bitwright.models.format_execution import FormatAssignment, execute_in
from bitwright.models.load import load

CONFIG = DecoderConfig(53, 48, 2, 6, 2, 16, 64, max_positions=64)


def random_decoder(config: DecoderConfig = CONFIG, seed: int = 0) -> Decoder:
    torch.manual_seed(seed)
    model = Decoder(config).double().eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.copy_(torch.randn(parameter.shape) * (0.2 if parameter.dim() == 2 else 1))
    for layer in model.layers:
        for head in range(config.kv_heads):
            rows = layer.attention.key.weight[head * config.head_dim :][: config.head_dim]
            rows[torch.randperm(config.head_dim)[:3]] *= 9
    return model


def turn_interleaved(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """RoFormer, equation 34, channel by channel."""
    out = torch.empty_like(x)
    out[..., 0::2] = x[..., 0::2] * cosines[:, 0::2] - x[..., 1::2] * sines[:, 0::2]
    out[..., 1::2] = x[..., 1::2] * cosines[:, 0::2] + x[..., 0::2] * sines[:, 0::2]
    return out


class Plain(nn.Module):
    """Attention with biases, in the interleaved layout or with linear position biases (ALiBi) instead of rotation."""

    def __init__(self, heads: int, kv_heads: int, width: int, rotary: str | None) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.width = heads, kv_heads, width
        self.query = nn.Linear(24, heads * width)
        self.key = nn.Linear(24, kv_heads * width)
        self.value = nn.Linear(24, kv_heads * width)
        if rotary is not None:
            self.rotary_layout = rotary
            self.rotate: Callable[..., Tensor] = turn_interleaved if rotary == "interleaved" else rotate

    attend = staticmethod(functional.scaled_dot_product_attention)

    def forward(self, x: Tensor) -> Tensor:
        def split(y: Tensor) -> Tensor:
            return y.unflatten(-1, (-1, self.width)).transpose(1, 2)

        q, k, v = split(self.query(x)), split(self.key(x)), split(self.value(x))
        positions = torch.arange(x.shape[1], dtype=x.dtype)
        mask = (positions[None] - positions[:, None]).clamp(max=0) * 0.3
        if hasattr(self, "rotate"):
            angles = torch.outer(positions, 100.0 ** -torch.arange(0, 1, 2 / self.width, dtype=x.dtype))
            if self.rotary_layout == "half":
                angles = torch.cat((angles, angles), -1)
            else:
                angles = angles.repeat_interleave(2, -1)
            q, k = self.rotate(q, angles.cos(), angles.sin()), self.rotate(k, angles.cos(), angles.sin())
            mask = torch.zeros_like(mask)
        out: Tensor = self.attend(q, k, v, attn_mask=mask, enable_gqa=True)
        return out


@pytest.mark.parametrize("rope", ["permuted", "pair"])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (4, 1)])
@pytest.mark.parametrize("rotary", ["half", "interleaved", None])
def test_outputs_stay(rope: str, heads: tuple[int, int], rotary: str | None) -> None:
    torch.manual_seed(1)
    model = Plain(*heads, 8, rotary).double().eval().requires_grad_(False)
    x = torch.randn(2, 7, 24, dtype=torch.float64)
    sorted_model, report = k_sort(model, 4, rope)  # type: ignore[arg-type]
    assert not torch.equal(report[0].permutation, torch.arange(8).expand(heads[1], 8))
    assert not torch.equal(sorted_model.key.weight, model.key.weight)
    assert (sorted_model(x) - model(x)).abs().max() < 1e-10


@pytest.mark.parametrize("rope", ["permuted", "pair"])
@pytest.mark.parametrize("kv_heads", [2, 6])
def test_logits_of_decoders_stay(rope: str, kv_heads: int) -> None:
    model = random_decoder(DecoderConfig(53, 48, 2, 6, kv_heads, 16, 64, max_positions=64))
    ids = torch.randint(0, 53, (2, 20))
    made, _ = k_sort(model, 8, rope)  # type: ignore[arg-type]
    assert (made(ids) - model(ids)).abs().max() < 1e-10
    cache = [KeyValueCache(model.config, 2, 20, torch.float64) for _ in range(2)]
    for one, kept in zip((model, made), cache, strict=True):
        one(ids[:, :12], kept)
    assert (model(ids[:, 12:], cache[0]) - made(ids[:, 12:], cache[1])).abs().max() < 1e-10
    assert not torch.equal(cache[0].keys, cache[1].keys)


def test_random_permutations_keep_logits_and_their_inverse_restores_the_weights() -> None:
    model = random_decoder()
    ids = torch.randint(0, 53, (1, 15))
    expected = model(ids)
    originals = [(layer.attention.query.weight.clone(), layer.attention.key.weight.clone()) for layer in model.layers]
    orders = [torch.stack([torch.randperm(16) for _ in range(2)]) for _ in model.layers]
    for layer, order in zip(model.layers, orders, strict=True):
        fold(layer.attention, order)
    assert (model(ids) - expected).abs().max() < 1e-10
    for layer, order, (query, key) in zip(model.layers, orders, originals, strict=True):
        fold(layer.attention, order.argsort(-1))
        assert torch.equal(layer.attention.query.weight, query)
        assert torch.equal(layer.attention.key.weight, key)
    assert torch.equal(model(ids), expected)


def test_permuted_rotation_is_the_permutation_of_the_rotation() -> None:
    cosines, sines = rotary_tables(CONFIG, torch.arange(9))
    x = torch.randn(2, 2, 9, 16)
    order = torch.stack([torch.randperm(16), torch.randperm(16)])
    gathered = order[None, :, None].expand(x.shape)
    turned = PermutedRotary(order, "half")(x.gather(-1, gathered), cosines, sines)
    assert torch.allclose(turned, rotate(x, cosines, sines).gather(-1, gathered), atol=1e-6)


def test_scores_sort_descending_with_ties_by_index() -> None:
    scores = torch.tensor([[1.0, 3.0, 3.0, 0.5, 3.0, 2.0]])
    assert sort_channels(scores).tolist() == [[1, 2, 4, 5, 0, 3]]
    # pairs (0, 3), (1, 4), (2, 5): norms sqrt(1.25), sqrt(18), sqrt(13)
    assert sort_pairs(scores, "half").tolist() == [[1, 2, 0, 4, 5, 3]]
    # pairs (0, 1), (2, 3), (4, 5): norms sqrt(10), sqrt(9.25), sqrt(13)
    assert sort_pairs(scores, "interleaved").tolist() == [[4, 5, 0, 1, 2, 3]]
    assert partners(4, "half")[0].tolist() == [2, 3, 0, 1]
    assert partners(4, "interleaved")[1].tolist() == [-1, 1, -1, 1]


def error(x: Tensor, name: str) -> Tensor:
    return formats.fake_quantise(formats.parse(name), x) - x


def test_one_block_per_head_gains_nothing() -> None:
    keys = torch.randn(500, 64) * torch.exp(torch.randn(64))
    order = torch.randperm(64)
    assert torch.equal(error(keys[:, order], "bfp12_64"), error(keys, "bfp12_64")[:, order])


@pytest.mark.parametrize("block", [8, 16])
def test_planted_outliers_reach_the_oracle_grouping(block: int) -> None:
    torch.manual_seed(2)
    channels, hidden = 64, 128
    weight = torch.randn(channels, hidden) / math.sqrt(hidden)
    planted = torch.randperm(channels)[:block]
    weight[planted] *= 8
    linear = nn.Linear(hidden, channels, bias=False)
    linear.weight = nn.Parameter(weight)
    attention = nn.Module()
    attention.heads, attention.query, attention.key = 1, nn.Linear(hidden, channels), linear
    scores = weight_scores(attention)
    keys = torch.randn(4000, hidden) @ weight.T
    order = sort_channels(scores)[0]
    rest = torch.tensor([c for c in range(channels) if c not in set(planted.tolist())])
    oracle = torch.cat((planted, rest))
    name = f"bfp14_{block}"
    ours, best, unsorted = (float(error(keys[:, each], name).square().sum()) for each in (order, oracle, slice(None)))
    assert ours <= best * 1.01
    shared = [torch.exp2(2 * torch.floor(torch.log2(keys[:, each].unflatten(-1, (-1, block)).abs().amax(-1)))).sum()
              for each in (slice(None), order)]  # fmt: skip
    assert unsorted / ours > 1.5
    assert unsorted / ours == pytest.approx(float(shared[0] / shared[1]), rel=0.10)


def test_report_predicts_from_block_maxima() -> None:
    made, report = k_sort(random_decoder(), 4)
    for entry in report:
        before = sum(float(entry.scores[0, at : at + 4].max()) ** 2 for at in range(0, 16, 4))
        ordered = entry.scores[0][entry.permutation[0]]
        assert bool((ordered.diff() <= 0).all())
        after = sum(float(ordered[at : at + 4].max()) ** 2 for at in range(0, 16, 4))
        assert float(entry.predicted_gain[0]) == pytest.approx(before / after)
    assert [entry.name for entry in report] == ["layers.0.attention", "layers.1.attention"]
    assert isinstance(made.layers[0].attention.rotate, PermutedRotary)
    assert float(block_energy(torch.tensor([1.0, 2.0, 3.0, 4.0]), 2)) == 20.0


def test_the_scale_of_the_norm_before_is_part_of_the_score() -> None:
    """Channel 5 alone reads an input that the norm makes 100 times larger; its weights are small."""
    model = random_decoder()
    for layer in model.layers:
        layer.attention.key.weight.copy_(torch.randn(layer.attention.key.weight.shape, dtype=torch.float64))
        layer.attention.key.weight[:, 7] = 0
        layer.attention.key.weight[5] *= 0.5
        layer.attention.key.weight[5, 7] = 0.5
        layer.attention_norm.weight[7] = 100
    _, scaled = k_sort(model, 8, score="scaled-norm")
    _, plain = k_sort(model, 8)
    for one, two, layer in zip(scaled, plain, model.layers, strict=True):
        assert one.permutation[0, 0] == 5
        assert two.permutation[0, 0] != 5
        expected = (layer.attention.key.weight * layer.attention_norm.weight).norm(dim=1).reshape(2, 16)
        assert torch.allclose(one.scores, expected)
    attention = Plain(4, 2, 8, None)
    with pytest.raises(InputError, match="no neighbour"):
        k_sort(attention, 4, score="scaled-norm")


def test_random_tokens_calibrate_without_text() -> None:
    ids = random_tokens(53, 40, seed=3)
    assert ids.shape == (1, 40)
    assert torch.equal(ids, random_tokens(53, 40, seed=3))
    assert set(ids.flatten().tolist()) <= set(range(53))
    model = random_decoder()
    made, _ = k_sort(model, 8, score="calibrated", calibration=lambda network: network(ids))
    assert (made(ids) - model(ids)).abs().max() < 1e-10


@pytest.mark.parametrize("score", ["weight-norm", "calibrated"])
def test_sorting_raises_the_signal_to_noise_of_keys(score: str) -> None:
    model = random_decoder().float()
    ids = torch.randint(0, 53, (4, 30))

    def run(module: nn.Module) -> None:
        module(ids)

    options = {"calibration": run} if score == "calibrated" else {}
    made, _ = k_sort(model, 4, score=score, **options)  # type: ignore[arg-type]
    before, after = (key_sqnr_db(each, ["bfp12_4"], run)["bfp12_4"] for each in (model, made))
    gains = torch.stack([after[name] - before[name] for name in before])
    assert gains.min() > 0.1  # dB
    whole = [key_sqnr_db(each, ["bfp12_16"], run)["bfp12_16"] for each in (model, made)]
    assert all(torch.allclose(whole[0][name], whole[1][name], atol=1e-3) for name in before)
    assert "attend" not in made.layers[0].attention.__dict__


def test_sorted_model_runs_in_formats() -> None:
    model = random_decoder().float()
    ids = torch.randint(0, 53, (2, 16))
    made, _ = k_sort(model, 4)
    rounded = FormatAssignment(keys="bfp12_4")
    plain, unsorted, ours = (
        execute_in(each, names)(ids) for each, names in ((model, FormatAssignment()), (model, rounded), (made, rounded))
    )
    assert (ours - plain).square().mean() < (unsorted - plain).square().mean()


def test_encoder_without_rotation() -> None:
    torch.manual_seed(3)
    model = Encoder(EncoderConfig(30, 32, 2, 4, 48)).double().eval().requires_grad_(False)
    ids = torch.randint(0, 30, (2, 6))
    made, report = k_sort(model, 4)
    assert (made(ids) - model(ids)).abs().max() < 1e-10
    assert len(report) == 2


@pytest.mark.slow
@pytest.mark.parametrize("rope", ["permuted", "pair"])
def test_logits_of_smollm2_stay(rope: str) -> None:
    model = load("smollm2-135m").decoder.double()
    ids = torch.arange(400, 424)[None] * 7
    made, report = k_sort(model, 32, rope)  # type: ignore[arg-type]
    assert len(report) == 30
    assert (made(ids) - model(ids)).abs().max() < 1e-10


@pytest.mark.parametrize(("keys", "values"), [("bfp12_8", "bfp12_16"), ("bfp16_16", None), (None, "mxfp4_8"),
                                              ("mxfp8_e4m3_16", "mxfp6_e2m3_4"), ("bfp14_4", "mxint8_16")])  # fmt: skip
def test_cache_holds_what_the_format_rounds_to(keys: str | None, values: str | None) -> None:
    cache = BfpKVCache(CONFIG, 2, 12, keys, values)
    torch.manual_seed(4)
    written = []
    for tokens in (5, 1, 3):
        layers = [[torch.randn(2, 2, tokens, 16) * 10 ** torch.randn(1) for _ in range(2)] for _ in range(2)]
        for layer, pair in enumerate(layers):
            read = cache.append(layer, *pair)
        cache.length += tokens
        written.append(layers[1])
    for place, name in enumerate((keys, values)):
        whole = torch.cat([pair[place] for pair in written], 2)
        expected = whole if name is None else formats.fake_quantise(formats.parse(name), whole)
        assert torch.equal(read[place], expected)


@pytest.mark.parametrize("name", ["bfp12_32", "bfp16_16", "mxint8"])
def test_the_attention_kernel_reads_the_cache(name: str) -> None:
    config = DecoderConfig(10, 256, 30, 4, 2, 64, 64)
    cache, query = BfpKVCache(config, 2, 40, name, name), torch.randn(4, 64)
    for layer in range(config.layers):
        keys, values = cache.append(layer, torch.randn(2, 2, 33, 64), torch.randn(2, 2, 33, 64))
    found = decode_attention(query.numpy(), *cache.packed(config.layers - 1, 1), tokens=33)
    exact = torch.nn.functional.scaled_dot_product_attention(
        query.double()[:, None], *(each[1].double().repeat_interleave(2, 0) for each in (keys, values))
    )
    assert np.allclose(found, exact[:, 0], atol=1e-5)
    for other in ((name, None), ("mxfp4", "mxfp4")):
        with pytest.raises(InputError, match="the kernel reads"):
            BfpKVCache(config, 1, 4, *other).packed(0)


def test_generation_with_the_packed_cache_is_that_of_rounded_keys_and_values() -> None:
    model = random_decoder().float()
    ids = torch.randint(0, 53, (2, 10))
    names = FormatAssignment(keys="bfp12_8", values="bfp12_16")
    expected = generate(execute_in(model, names), ids, 12)
    cache = BfpKVCache(CONFIG, 2, 22, "bfp12_8", "bfp12_16")
    assert torch.equal(generate(model, ids, 12, cache=cache), expected)
    made, _ = k_sort(model, 8)
    assert generate(made, ids, 12, cache=BfpKVCache(CONFIG, 2, 22, "bfp16_8", None)).shape == (2, 22)


def test_bytes_are_those_of_the_formula() -> None:
    config = DecoderConfig(10, 576, 30, 9, 3, 64, 64)
    for keys, values in (("bfp12_32", "bfp12_32"), ("bfp16_64", "bfp12_16"), ("mxfp4", "mxfp8_e4m3")):
        cache = BfpKVCache(config, 1, 2048, keys, values)
        assert cache.stored_bytes == kv_bytes(config, 2048, 1, keys, values)
    bits = 30 * 2048 * 2 * 3 * 64
    assert kv_bytes(config, 2048, 1, "bfp12_32") * 8 == bits * 4.25
    assert kv_bytes(config, 2048, 1, "fp16") / kv_bytes(config, 2048, 1, "bfp12_64") == pytest.approx(16 / 4.125)
    assert kv_bytes(config, 2048, 1, "bfp16_64") / kv_bytes(config, 2048, 1, "bfp12_64") == pytest.approx(
        1.97, rel=1e-3
    )


def test_bytes_of_llama_2() -> None:
    config = configuration("llama-2-7b")
    assert kv_bytes(config, 4096, 1, "fp16") == 2 * 32 * 32 * 128 * 4096 * 2  # 2 GiB
    assert kv_bytes(config, 4096, 1, "bfp12_128") * 128 * 16 == kv_bytes(config, 4096, 1, "fp16") * (4 * 128 + 8)
    assert largest_batch(config, 32768, 80 * 2**30, "fp16") == 5
    assert largest_batch(config, 32768, 80 * 2**30, "bfp12_32") == math.floor(5 * 16 / 4.25)


class Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c_attn = nn.Linear(8, 24)


def test_what_is_refused() -> None:
    model = random_decoder()
    for block in (0, 5, 32):
        with pytest.raises(InputError, match="do not divide"):
            k_sort(model, block)
    with pytest.raises(InputError, match="expected permuted or pair"):
        k_sort(model, 8, "free")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="calibration data"):
        k_sort(model, 8, score="calibrated")
    with pytest.raises(InputError, match="unknown layout"):
        k_sort(nn.Sequential(Fused()), 4)
    with pytest.raises(InputError, match="no attention"):
        k_sort(nn.Sequential(nn.Linear(2, 2)), 4)
    attention = model.layers[0].attention
    for wrong in (torch.arange(8).expand(2, 8), torch.zeros(2, 16, dtype=torch.long), torch.arange(16)[None]):
        with pytest.raises(InputError, match="permutation of 16 channels for each of 2 heads"):
            fold(attention, wrong)
    normed = Plain(2, 2, 8, "half")
    normed.key_norm = nn.LayerNorm(8)
    with pytest.raises(InputError, match="key_norm"):
        k_sort(normed, 4)
    tied = Plain(2, 2, 8, None)
    tied.query.weight = tied.key.weight
    with pytest.raises(InputError, match="share one weight"):
        k_sort(tied, 4)
    one = Plain(2, 2, 8, None)
    with pytest.raises(InputError, match="shares its key weights"):
        k_sort(nn.Sequential(one, one), 4)
    blind = nn.Module()
    blind.query, blind.key, blind.heads = nn.Linear(4, 4), nn.Linear(4, 4), 1
    with pytest.raises(InputError, match="no `attend`"):
        observe_keys(blind, lambda module: None, lambda name, keys: None)
    with pytest.raises(InputError, match="half or interleaved"):
        partners(5, "half")


def test_what_the_cache_refuses() -> None:
    with pytest.raises(InputError, match="shared by a block"):
        BfpKVCache(CONFIG, 1, 4, "int4/16")
    with pytest.raises(InputError, match="do not fill"):
        BfpKVCache(CONFIG, 1, 4, "bfp12_32")
    cache = BfpKVCache(CONFIG, 1, 4, "bfp12_8", "bfp12_8")
    with pytest.raises(InputError, match="capacity of 4"):
        cache.append(0, torch.ones(1, 2, 5, 16), torch.ones(1, 2, 5, 16))
    with pytest.raises(InputError, match="bfp12_8 has no code for NaN"):
        cache.append(0, torch.full((1, 2, 1, 16), torch.nan), torch.ones(1, 2, 1, 16))
    with pytest.raises(InputError, match="at least 1"):
        kv_bytes(CONFIG, 0, 1, "fp16")
    with pytest.raises(InputError, match="Unknown number format"):
        kv_bytes(CONFIG, 4, 1, "fp12")
    assert np.isfinite(kv_bytes(CONFIG, 4, 1, "bfp12_8"))
