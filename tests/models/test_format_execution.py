"""Number-format execution against float64 products of independently rounded operands, and codes against values."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from bitwright.arithmetic import formats
from bitwright.arithmetic import logarithmic_multiplication as lmul
from bitwright.core.errors import BitwrightError, InputError
from bitwright.models.decoder import Decoder, generate
from bitwright.models.encoder import Encoder, EncoderConfig
from bitwright.models.format_execution import FormatAssignment, FormatLinear, execute_in, format_attention
from bitwright.models.format_products import Accumulation, Rounding, rounding
from bitwright.models.integer import IntegerLinear


def rounded(name: str | None, x: Tensor) -> np.ndarray:
    real = x.numpy()
    if name is not None:
        form = formats.parse(name)
        real = form.decode(form.encode(real))
    return real.astype(np.float64)


def relative(ours: Tensor, expected: np.ndarray) -> float:
    return float(np.abs(ours.numpy() - expected).max() / np.abs(expected).max())


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([
        "int8/row", "int4/row", "int4/32", "int5/8,fp16", "uint4/32", "int4/7", "fp8_e4m3/row", "fp8_e5m2/tensor",
        "fp8_e4m3/none", "mxfp4", "mxfp8_e4m3", "bfp12_32", "mxint8", "lmul_e4m3/row", "lmul_e5m2/none",
    ]),
    st.integers(1, 9),
    st.integers(1, 6),
    st.integers(0, 2**31),
    st.sampled_from([0.0, 1e-3, 1.0, 1e2]),
)  # fmt: skip
def test_operands_are_the_rounding_of_the_format(name: str, rows: int, blocks: int, seed: int, size: float) -> None:
    x = torch.from_numpy(np.random.default_rng(seed).normal(0, size, (rows, 32 * blocks)).astype(np.float32))
    form = formats.parse(name)
    expected = torch.from_numpy(form.decode(form.encode(x.numpy())))
    assert torch.equal(rounding(name).values(x), expected)
    operand = rounding(name)(x)
    assert torch.allclose(operand.real, expected, rtol=2**-22, atol=0)
    if operand.bf16:
        assert torch.equal(operand.values.bfloat16().float(), operand.values)


def test_rounding_keeps_dtype_and_leaves_the_input() -> None:
    x = torch.randn(3, 4, 64, dtype=torch.bfloat16)
    before = x.clone()
    made = rounding("int4/32").values(x)
    assert made.dtype == torch.bfloat16
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    ("weights", "activations"),
    [
        ("int4/32", None),
        (None, "int8/row"),
        ("int8/row", "int8/row"),
        ("int4/32", "int8/row"),
        ("uint4/16", "int4/8"),
        ("fp8_e4m3/row", "fp8_e5m2/tensor"),
        ("mxfp4", "mxfp8_e4m3"),
        ("bfp12_16", "bfp16_32"),
        ("fp6_e2m3/none", "int8/row"),
    ],
)
@pytest.mark.parametrize("exact", [False, True])
def test_linear_is_the_product_of_rounded_operands(weights: str | None, activations: str | None, exact: bool) -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(96, 33), torch.randn(2, 5, 96)
    layer = FormatLinear(linear, weights, activations, "fp32", exact)
    with torch.no_grad():
        ours = layer(x)
    expected = rounded(activations, x) @ rounded(weights, linear.weight.detach()).T + linear.bias.detach().numpy()
    assert ours.shape == (2, 5, 33)
    assert relative(ours, expected) < 2e-6


def added(left: np.ndarray, right: np.ndarray, name: str) -> np.ndarray:
    """left (m, k) by right (n, k)^T, both rounded to a row format of L-Mul codes, summed in float64."""
    form = formats.parse(name)
    codes = [form.encode(each) for each in (left, right)]
    unit = [each.scale.astype(np.float64) / form.element.unit for each in codes]
    values = [form.integers(each.codes) * form.element.unit for each in codes]
    products = lmul.multiply(values[0][:, None], values[1][None], name[5:9])
    return np.asarray(products.sum(-1) * unit[0] * unit[1].T)


@pytest.mark.parametrize("name", ["lmul_e4m3/row", "lmul_e5m2/row"])
@pytest.mark.parametrize("exact", [False, True])
def test_linear_of_added_codes(name: str, exact: bool) -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(96, 33), torch.randn(10, 96) * torch.logspace(-3, 0, 96)
    with torch.no_grad():
        ours = FormatLinear(linear, name, name, "fp32", exact)(x)
    expected = added(x.numpy(), linear.weight.detach().numpy(), name) + linear.bias.detach().numpy()
    assert relative(ours, expected) < 2e-6
    assert relative(x @ linear.weight.detach().t() + linear.bias.detach(), expected) > 1e-2


def test_attention_of_added_codes() -> None:
    torch.manual_seed(1)
    query, key, value = torch.randn(1, 4, 3, 16), torch.randn(1, 2, 5, 16), torch.randn(1, 2, 5, 16)
    name = "lmul_e4m3/row"
    names = FormatAssignment(keys=name, values=name, attention=name)
    made = format_attention(query, key, value, enable_gqa=True, assignment=names)
    form = formats.parse(name)
    for head in range(4):
        k, v = key[0, head // 2], value[0, head // 2]
        # queries of the heads that share keys are rounded one by one, like rows of a matrix
        weights = torch.softmax(torch.from_numpy(added(query[0, head].numpy(), k.numpy(), name)) / 4, -1)
        codes = form.encode(v.numpy())
        scale = codes.scale[:, 0] / form.element.unit
        rounded = form.encode((weights.numpy() * scale).astype(np.float32))
        left = form.integers(rounded.codes) * form.element.unit
        right = form.integers(codes.codes) * form.element.unit
        expected = lmul.multiply(left[:, :, None], right[None], "e4m3").sum(1) * (rounded.scale / form.element.unit)
        assert relative(made[0, head], expected) < 1e-5


def test_added_codes_with_sums_of_few_bits() -> None:
    torch.manual_seed(2)
    linear, x = nn.Linear(64, 9, bias=False), torch.randn(6, 64)
    layer = FormatLinear(linear, "lmul_e4m3/row", "lmul_e4m3/row", "bf16/16")
    form = formats.parse("lmul_e4m3/row")
    codes = [form.encode(each.detach().numpy()) for each in (x, linear.weight)]
    values = [form.integers(each.codes) * form.element.unit for each in codes]
    products = torch.from_numpy(lmul.multiply(values[0][:, None], values[1][None], "e4m3"))
    total = torch.zeros(6, 9)
    for start in range(0, 64, 16):
        total = (total + products[..., start : start + 16].sum(-1).float()).bfloat16().float()
    scales = [torch.from_numpy(each.scale / np.float32(form.element.unit)) for each in codes]
    with torch.no_grad():
        assert relative(layer(x), (total * scales[0] * scales[1].T).numpy()) < 1e-2


@pytest.mark.parametrize(
    "names", [{"weights": "lmul_e4m3/row"}, {"weights": "lmul_e4m3/row", "activations": "lmul_e5m2/row"},
              {"keys": "lmul_e4m3/row", "attention": "fp8_e4m3/row"}, {"values": "lmul_e4m3/row"}],
)  # fmt: skip
def test_added_codes_meet_their_own_kind_only(names: dict[str, str]) -> None:
    with pytest.raises(InputError, match="need the same on both sides"):
        FormatAssignment(**names)


def test_int8_rows_are_those_of_integer_execution() -> None:
    torch.manual_seed(1)
    linear, x = nn.Linear(200, 40), torch.randn(7, 200)
    with torch.no_grad():
        assert torch.equal(FormatLinear(linear, "int8/row", "int8/row", "fp32")(x), IntegerLinear(linear)(x))


class PowerOfTwoScales(nn.Linear):
    """Weights -7 .. 7 whose largest is 7 in every row, so that int4 scales are exactly 1."""

    def __init__(self) -> None:
        super().__init__(64, 24, bias=False)
        with torch.no_grad():
            self.weight.copy_(torch.randint(-7, 8, (24, 64)))
            self.weight[:, 0], self.weight[:, 32] = 7, -7


def test_codes_equal_values_bitwise_when_scales_are_powers_of_two() -> None:
    torch.manual_seed(2)
    linear = PowerOfTwoScales()
    x = torch.randint(-7, 8, (10, 64)).float()
    x[:, 0], x[:, 40] = 7, 7
    x = x * torch.tensor([1.0, 0.25, 8, 1, 1, 2, 1, 0.5, 1, 4])[:, None]
    values = FormatLinear(linear, "int4/32", "int4/32", "fp32")(x)
    codes = FormatLinear(linear, "int4/32", "int4/32", "fp32", exact=True)(x)
    assert torch.equal(values, codes)
    assert torch.equal(values, x @ linear.weight.detach().T)


@pytest.mark.parametrize("size", [1, 5, 32])
def test_accumulation_rounds_every_partial_sum(size: int) -> None:
    torch.manual_seed(3)
    linear, x = nn.Linear(64, 9, bias=False), torch.randn(4, 64)
    ours = FormatLinear(linear, None, None, f"bf16/{size}")(x).detach()
    total = np.zeros((4, 9), np.float32)
    import ml_dtypes

    weight = linear.weight.detach().numpy()
    for start in range(0, 64, size):
        chunk = slice(start, start + size)
        part = np.float32(x.numpy()[:, chunk].astype(np.float64) @ weight[:, chunk].T.astype(np.float64))
        total = (total + part).astype(ml_dtypes.bfloat16).astype(np.float32)
    assert relative(ours, total) < 2**-7
    assert (ours.numpy() == total).mean() > 0.9  # a float32 sum in another order may cross a rounding boundary
    assert torch.equal(ours, ours.bfloat16().float())


def test_accumulators_saturate() -> None:
    assert Accumulation.parse("fp8_e4m3").round(torch.tensor([1e9, -1e9, 1.06])).tolist() == [448.0, -448.0, 1.0]
    assert Accumulation.parse("fp16/4") == Accumulation(torch.float16, 4)
    assert torch.equal(Accumulation().round(torch.tensor([1e-9])), torch.tensor([1e-9]))


def reference_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: np.ndarray, names: FormatAssignment
) -> np.ndarray:
    """In float64, head by head, from rounded operands; scales of values folded into probabilities."""
    shared = query.shape[1] // key.shape[1]
    out = np.zeros(query.shape)
    for b in range(query.shape[0]):
        for h in range(query.shape[1]):
            q = rounded(names.attention, query[b, h])
            scores = q @ rounded(names.keys, key[b, h // shared]).T / np.sqrt(q.shape[1])
            scores = np.where(mask, scores, -np.inf)
            p = np.exp(scores - scores.max(-1, keepdims=True))
            p /= p.sum(-1, keepdims=True)
            v = value[b, h // shared].numpy().astype(np.float64)
            if names.values is None:
                out[b, h] = rounded(names.attention, torch.from_numpy(p).float()) @ v
                continue
            form = formats.parse(names.values)
            encoded = form.encode(v.astype(np.float32))
            size = v.shape[1] // encoded.scale.shape[-1]
            for g in range(encoded.scale.shape[-1]):
                part = slice(g * size, (g + 1) * size)
                folded = torch.from_numpy(p * encoded.scale[:, g]).float()
                out[b, h, :, part] = rounded(names.attention, folded) @ form.integers(encoded.codes)[:, part]
    return out


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(
    "names",
    [
        FormatAssignment(keys="int4/8"),
        FormatAssignment(values="int8/row"),
        FormatAssignment(keys="int4/8", values="int4/8"),
        FormatAssignment(keys="int8/row", values="int8/row", attention="int8/row"),
        FormatAssignment(keys="int4/8", values="int4/8", attention="int8/8"),
        FormatAssignment(attention="int8/row"),
    ],
)
def test_attention_is_the_product_of_rounded_operands(names: FormatAssignment, exact: bool) -> None:
    torch.manual_seed(4)
    query, key, value = torch.randn(2, 6, 9, 16), torch.randn(2, 3, 9, 16), torch.randn(2, 3, 9, 16)
    ours = format_attention(query, key, value, is_causal=True, enable_gqa=True, assignment=names, exact=exact)
    expected = reference_attention(query, key, value, np.tri(9, dtype=bool), names)
    # a probability next to a rounding boundary may fall on the other side
    assert relative(ours, expected) < (1e-5 if names.attention is None else 4e-3)
    assert np.abs(ours.numpy() - expected).mean() < 2e-4 * np.abs(expected).mean() + 1e-7


def test_attention_without_formats_is_that_of_torch() -> None:
    torch.manual_seed(5)
    query, key, value = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 7, 8), torch.randn(1, 2, 7, 8)
    mask = torch.arange(7) <= torch.arange(5)[:, None] + 2
    expected = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
    plain = format_attention(query, key, value, mask, enable_gqa=True, assignment=FormatAssignment())
    assert torch.equal(plain, expected)
    added = torch.zeros(5, 7).masked_fill(~mask, -torch.inf)
    wide = FormatAssignment(accumulation="fp16/64")
    close = format_attention(query, key, value, added, enable_gqa=True, assignment=wide)
    assert torch.allclose(close, expected, atol=2e-3)


@pytest.mark.parametrize(
    "names",
    [
        FormatAssignment("int8/row", "int8/row"),
        FormatAssignment("int4/16", "int8/row", "int8/row", "int8/row", "int8/row"),
        FormatAssignment("int4/16", None, "int4/8", "int4/8"),
    ],
)
def test_decoder_in_codes_agrees_with_values(tiny: Decoder, names: FormatAssignment) -> None:
    ids = torch.randint(0, 97, (2, 12), generator=torch.Generator().manual_seed(0))
    exact = names.activations is not None
    values, codes = execute_in(tiny, names)(ids), execute_in(tiny, names, exact=exact)(ids)
    plain = tiny(ids)
    scale = plain.abs().max()
    assert (values - plain).abs().max() > 1e-4 * scale  # something was rounded
    assert (values - codes).abs().mean() < 2e-3 * scale


def test_unquantised_is_bitwise_the_model_and_shares_parameters(tiny: Decoder) -> None:
    ids = torch.randint(0, 97, (1, 9))
    twin = execute_in(tiny, FormatAssignment())
    assert torch.equal(twin(ids), tiny(ids))
    assert twin.embedding.weight is tiny.embedding.weight
    rounded_twin = execute_in(tiny, FormatAssignment(weights="int4/16"))
    assert rounded_twin.embedding.weight is tiny.embedding.weight
    assert isinstance(tiny.layers[0].attention.query, nn.Linear)


def test_generation_through_the_cache_gives_the_tokens_of_whole_passes(tiny: Decoder) -> None:
    twin = execute_in(tiny, FormatAssignment("int4/16", "int8/row", "int4/8", "int4/8"))
    ids = torch.randint(0, 97, (2, 6), generator=torch.Generator().manual_seed(1))
    grown = generate(twin, ids, 8)
    for end in range(6, 14):
        assert torch.equal(twin(grown[:, :end])[:, -1].argmax(-1), grown[:, end])


def test_encoder_runs_in_formats() -> None:
    torch.manual_seed(6)
    model = Encoder(EncoderConfig(50, 32, 2, 4, 64)).eval()
    ids, mask = torch.randint(0, 50, (3, 7)), torch.ones(3, 7, dtype=torch.bool)
    with torch.inference_mode():
        twin = execute_in(model, FormatAssignment("int8/row", "int8/row", "int8/row", "int8/row", "int8/row"))
        assert 0 < (twin(ids, mask) - model(ids, mask)).abs().max() < 0.2


class Other(nn.Module):
    """A model of another library: no `attend`, attention through the function of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(16, 48)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        out: Tensor = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return out


def test_attention_of_other_models_is_intercepted() -> None:
    torch.manual_seed(7)
    model, x = Other().eval(), torch.randn(2, 5, 16)
    names = FormatAssignment(keys="int4/8", values="int4/8")
    with torch.inference_mode():
        q, k, v = model.project(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        expected = reference_attention(q, k, v, np.tri(5, dtype=bool), names)
        assert relative(execute_in(model, names)(x), expected) < 1e-5


class Both(nn.Module):
    """Attention of its own and one with an `attend` function: both run in the formats."""

    def __init__(self) -> None:
        super().__init__()
        self.other, self.own = Other(), nn.Linear(16, 16)
        self.own.attend = functional.scaled_dot_product_attention

    def forward(self, x: Tensor) -> Tensor:
        attend = self.own.attend if isinstance(self.own, nn.Linear) else functional.scaled_dot_product_attention
        out: Tensor = self.other(x) + attend(*(x.unflatten(-1, (2, 8)).transpose(1, 2),) * 3)
        return out


def test_attention_of_both_kinds_runs_in_formats() -> None:
    torch.manual_seed(9)
    model, x = Both().eval(), torch.randn(2, 5, 16)
    names = FormatAssignment(keys="int4/8", values="int4/8")
    heads = x.unflatten(-1, (2, 8)).transpose(1, 2)
    with torch.inference_mode():
        q, k, v = model.other.project(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        expected = reference_attention(q, k, v, np.tri(5, dtype=bool), names)
        expected = expected + reference_attention(heads, heads, heads, np.ones((5, 5), bool), names)
        assert relative(execute_in(model, names)(x), expected) < 1e-5


@pytest.mark.parametrize("make", [Other, Both])
def test_the_last_assignment_counts(make: type[nn.Module]) -> None:
    torch.manual_seed(9)
    model, x = make().eval(), torch.randn(2, 5, 16)
    first, last = FormatAssignment(keys="int2/8", values="int2/8"), FormatAssignment(keys="int8/8", values="int8/8")
    with torch.inference_mode():
        assert torch.equal(execute_in(execute_in(model, first), last)(x), execute_in(model, last)(x))


def test_copy_of_an_intercepted_model_runs_its_own_layers() -> None:
    torch.manual_seed(7)
    twin, x = execute_in(Other().eval(), FormatAssignment(keys="int4/8", values="int4/8")), torch.randn(2, 5, 16)
    copied = copy.deepcopy(twin)
    with torch.inference_mode():
        before = twin(x)
        assert torch.equal(copied(x), before)
        copied.project.weight.mul_(0)
        assert torch.equal(twin(x), before)
        assert not torch.equal(copied(x), before)
        again = execute_in(twin, FormatAssignment(weights="int4/row"))
        assert not torch.equal(again(x), before)


def test_transformers_model_runs_in_formats() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attn_implementation="sdpa",
    )  # fmt: skip
    torch.manual_seed(8)
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 60, (1, 10))
    with torch.inference_mode():
        plain = model(ids).logits
        assert torch.equal(execute_in(model, FormatAssignment())(ids).logits, plain)
        made = execute_in(model, FormatAssignment("int8/row", "int8/row", "int4/8", "int4/8"))(ids).logits
    assert 0 < (made - plain).abs().max() < 0.5 * plain.abs().max()


def test_nan_is_refused_by_name() -> None:
    x = torch.randn(2, 32)
    x[1, 3] = torch.nan
    for name in ("int8/row", "int4/32"):
        with pytest.raises(InputError, match=f"{name} has no code for NaN"):
            rounding(name).values(x)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"weights": "int9"}, "2 to 8"),
        ({"weights": "posit8"}, "Unknown number format"),
        ({"keys": "int8/tensor"}, "cache grows"),
        ({"accumulation": "bf16/0"}, "every n"),
        ({"accumulation": "int8"}, "expected fp32"),
    ],
)
def test_wrong_names(names: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        FormatAssignment(**names)


def test_what_cannot_be_executed(tiny: Decoder) -> None:
    with pytest.raises(InputError, match="both sides"):
        execute_in(tiny, FormatAssignment(weights="int8/row"), exact=True)
    with pytest.raises(BitwrightError, match="no linear layers"):
        execute_in(nn.Conv1d(1, 1, 1), FormatAssignment())
    with pytest.raises(InputError, match="MultiheadAttention"):
        execute_in(nn.TransformerEncoderLayer(8, 2), FormatAssignment(keys="int8/row"))
    perceptron = execute_in(nn.Sequential(nn.Linear(4, 4)), FormatAssignment(keys="int8/row"))
    with pytest.raises(InputError, match="reach nothing"):
        perceptron(torch.randn(2, 4))
    query, key = torch.randn(1, 3, 2, 4), torch.randn(1, 2, 2, 4)
    with pytest.raises(InputError, match="multiple"):
        format_attention(query, key, key, enable_gqa=True, assignment=FormatAssignment())
    with pytest.raises(InputError, match="dropout"):
        format_attention(key, key, key, dropout_p=0.1, assignment=FormatAssignment())
    with pytest.raises(InputError, match="do not divide"):
        format_attention(key, key, key, assignment=FormatAssignment(values="int4/3", attention="int8/row"))


def test_names_of_assignments() -> None:
    assert FormatAssignment().name == "unquantised"
    assert FormatAssignment("int4/32", accumulation="bf16").name == "weights int4/32, accumulation bf16"
    assert Rounding()(torch.ones(1, 2)).real.tolist() == [[1.0, 1.0]]
