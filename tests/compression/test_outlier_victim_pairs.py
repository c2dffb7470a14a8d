"""Networks in outlier-victim pairs: what is stored, what is multiplied, calibration, and bad input."""

import numpy as np
import pytest
import torch
from torch import nn

from bitwright.arithmetic import formats
from bitwright.arithmetic.formats.outlier_victim import OutlierVictimPairs
from bitwright.compression.outlier_victim_pairs import PairLinear, PairSettings, TrainedPairs, apply, quantise
from bitwright.core.errors import BitwrightError, InputError


class Network(nn.Module):
    """Two linear layers and a head."""

    def __init__(self, inputs=24, hidden=33):
        super().__init__()
        self.first, self.second = nn.Linear(inputs, hidden), nn.Linear(hidden, inputs, bias=False)
        self.lm_head = nn.Linear(inputs, 5)

    def forward(self, x):
        return self.lm_head(self.second(torch.relu(self.first(x)) - 0.3))


class Conv1D(nn.Module):
    """The linear layer of GPT-2: weights (inputs, outputs)."""

    def __init__(self, outputs, inputs):
        super().__init__()
        self.nf, self.weight = outputs, nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x):
        return x @ self.weight + self.bias


@pytest.fixture
def network():
    torch.manual_seed(0)
    made = Network()
    with torch.no_grad():
        made.first.weight[3, 5] = 4.0  # an outlier
    return made.eval()


def batch(seed=1, rows=64):
    x = torch.randn(rows, 24, generator=torch.Generator().manual_seed(seed))
    x[:, 7] *= 12
    return x


def run(x):
    return lambda model: model(x)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("normal", ["int", "flint", "adaptive"])
def test_layers_compute_what_their_formats_say(network, bits, normal):
    """Against products of decoded weights and inputs rounded by the codec, with the scale of the calibration."""
    x, fresh = batch(), batch(2)
    made, layers = apply(network, bits, bits, run(x), PairSettings(normal=normal))
    assert [layer.name for layer in layers] == ["first", "second"]
    first = layers[0]
    weights, inputs = formats.parse(first.weights), formats.parse(first.activations)
    encoded = weights.encode(network.first.weight)
    assert first.weight_bytes == weights.pack(encoded).size == 33 * 24 * bits // 8 + 33 * 4
    assert first.activation_scale == float(inputs.encode(x).scale)
    rounded = inputs.decode(inputs.encode(fresh, np.array([first.activation_scale])))
    expected = rounded.astype(float) @ weights.decode(encoded).T.astype(float) + network.first.bias.detach().numpy()
    assert np.allclose(made.first(fresh).detach().numpy(), expected, rtol=1e-4, atol=1e-4)
    assert first.weight_error == pytest.approx(formats.error_statistics(weights, network.first.weight).relative_mse)
    if bits == 8 or normal != "adaptive":
        assert ("flint" in first.weights) == (normal == "flint" and bits == 4)
    made.first.exact = True
    assert np.allclose(made.first(fresh).detach().numpy(), expected, rtol=1e-5, atol=1e-5)


def test_odd_inputs_are_filled_up(network):
    made, layers = apply(network, 4, 4, run(batch()))
    assert layers[1].weight_bytes == 24 * 17 + 24 * 4  # 33 inputs are 17 pairs
    before = made.second(torch.ones(2, 33))
    made.second.exact = True
    assert torch.allclose(made.second(torch.ones(2, 33)), before, rtol=1e-4, atol=1e-5)


def test_scales_come_from_the_first_batch_and_stay(network):
    def two(model):
        model(batch(1))
        model(batch(1) * 100)

    _, once = apply(network, 4, 4, run(batch(1)))
    made, layers = apply(network, 4, 4, two)
    assert [layer.activation_scale for layer in layers] == [layer.activation_scale for layer in once]
    made(batch(3) * 50)
    assert made.first.input_scale == once[0].activation_scale


def test_the_model_is_left_alone_and_shares_what_is_not_replaced(network):
    x = batch()
    before = network(x)
    made, _ = apply(network, 4, None)
    assert torch.equal(network(x), before)
    assert isinstance(network.first, nn.Linear)
    assert made.lm_head.weight is network.lm_head.weight
    assert isinstance(made.first, PairLinear)
    assert not network.first._forward_pre_hooks


def test_pairs_beat_plain_integers_where_there_are_outliers(network):
    x, fresh = batch(rows=256), batch(4, 256)
    errors = {}
    for scheme in ("pairs", "clipped", "absmax"):
        made, _ = apply(network, 4, 4, run(x), PairSettings(scheme))
        errors[scheme] = (made(fresh) - network(fresh)).detach().square().mean().item()
    assert errors["pairs"] < 0.7 * errors["clipped"]
    assert errors["clipped"] <= 1.05 * errors["absmax"]


def test_plain_integers_are_those_of_the_integer_format(network):
    made, layers = apply(network, 8, 8, run(batch()), PairSettings("absmax"))
    assert layers[0].weights == "int8/row"
    expected = formats.parse("int8/row").encode(network.first.weight)
    assert np.array_equal(made.first.values.numpy(), formats.parse("int8/row").integers(expected.codes))


@pytest.mark.parametrize("bits", [4, 8])
def test_inputs_that_are_never_negative_lose_the_sign(bits):
    """After ReLU: unsigned pairs, half the step; products are still those of the decoded tensors."""
    torch.manual_seed(6)
    model = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
    x, fresh = batch(), batch(7)
    made, layers = apply(model, bits, bits, run(x), PairSettings(eight_bit_exponent=2))
    assert "unsigned" not in layers[0].activations + layers[0].weights + layers[1].weights
    assert layers[1].activations == f"ovp{bits}_unsigned/tensor"
    hidden = torch.relu(made[0](fresh)).detach().numpy()
    form, weights = formats.parse(layers[1].activations), formats.parse(layers[1].weights)
    rounded = form.decode(form.encode(hidden, np.array([layers[1].activation_scale], np.float32)))
    expected = rounded @ weights.decode(weights.encode(model[2].weight)).T + model[2].bias.detach().numpy()
    assert np.allclose(made(fresh).detach().numpy(), expected, rtol=1e-4, atol=1e-4)
    made[2].exact = True
    assert np.allclose(made(fresh).detach().numpy(), expected, rtol=1e-4, atol=1e-4)
    signed = apply(model, bits, bits, run(x), PairSettings(normal="flint"))[1]
    assert ("unsigned" in signed[1].activations) == (bits == 8)  # flint takes all 16 codes


def test_exponents_of_eight_bit_outliers_are_chosen_by_error(network):
    settings = PairSettings(eight_bit_exponent=None)
    for x in (torch.randn(16, 64), torch.randn(16, 64) * (1 + 2000 * (torch.rand(16, 64) < 0.02))):
        form, encoded = quantise(x.numpy(), 8, settings, "tensor")
        errors = {e: formats.error_statistics(OutlierVictimPairs(8, "tensor", exponent_bits=e), x).relative_mse
                  for e in (1, 2, 3, 4)}  # fmt: skip
        assert form.exponent_bits == min(errors, key=errors.get)
        assert np.array_equal(encoded.codes, form.encode(x).codes)


def test_some_layers_in_eight_bits(network):
    _made, layers = apply(network, 4, 4, run(batch()), eight_bit=["second"])
    assert [layer.weights.split("/")[0].split("_")[0] for layer in layers] == ["ovp4", "ovp8"]
    assert layers[1].activations.startswith("ovp8")
    assert apply(network, 4, None, keep_float=("second", "lm_head"))[1][0].name == "first"
    assert len(apply(network, 4, None, keep_float=())[1]) == 3


def test_the_transposed_layer_of_gpt2():
    torch.manual_seed(2)
    model = nn.Sequential(Conv1D(6, 10), nn.Linear(6, 4)).eval()
    x = torch.randn(3, 10)
    made, layers = apply(model, 8, None)
    assert layers[0].weight_bytes == 60 + 6 * 4
    assert torch.allclose(made(x), model(x), rtol=0.05, atol=0.1)


def test_bfloat16_inputs_keep_their_type(network):
    made, _ = apply(network, 8, 8, run(batch()))
    assert made.first(batch().bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["ovp4/row", "ovp4/tensor", "ovp4_flint/row", "ovp8/tensor"])
def test_training_through_the_rounding(name):
    torch.manual_seed(4)
    x = torch.randn(5, 8, requires_grad=True)
    form = formats.parse(name)
    layer, weight = TrainedPairs(form, x), torch.randn(5, 8)
    out = layer(x)
    assert np.allclose(out.detach().numpy(), form.decode(form.encode(x)), rtol=1e-5, atol=1e-6)
    (out * weight).sum().backward()
    assert torch.allclose(x.grad, weight, rtol=1e-5)
    each = weight * ((out - x) / layer.scale).detach()
    expected = each.sum(-1, keepdim=True) if layer.scale.dim() else each.sum()
    assert torch.allclose(layer.scale.grad, expected, rtol=1e-3, atol=1e-4)


def test_training_lowers_the_error_of_a_bad_scale():
    torch.manual_seed(5)
    x = torch.randn(4, 64)
    layer = TrainedPairs(formats.parse("ovp4/row"), x)
    with torch.no_grad():
        layer.scale *= 1.6
    optimiser = torch.optim.SGD(layer.parameters(), lr=3e-4)
    errors = []
    for _ in range(120):
        loss = (layer(x) - x).square().sum()
        errors.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert errors[-1] < 0.8 * errors[0]
    with torch.no_grad():
        layer.scale.zero_()
    with pytest.raises(InputError, match="0 or negative"):
        layer(x)
    with pytest.raises(InputError, match="per row or tensor"):
        TrainedPairs(formats.parse("ovp4/16"), x)


def unreached(model):
    model.first(batch())


@pytest.mark.parametrize(
    ("options", "match"),
    [({"weight_bits": 5, "activation_bits": None}, "4 or 8"),
     ({"activation_bits": 6, "calibration": unreached}, "4 or 8"),
     ({"activation_bits": 4}, "calibration"), ({"activation_bits": None, "calibration": unreached}, "calibration"),
     ({"calibration": unreached}, "second"), ({"activation_bits": None, "eight_bit": ["third"]}, "third"),
     ({"calibration": lambda model: model(batch() * float("nan"))}, "NaN")],
)  # fmt: skip
def test_bad_input(network, options, match):
    with pytest.raises(InputError, match=match):
        apply(network, **options)


def test_bad_settings_and_networks(network):
    with pytest.raises(InputError, match="expected pairs"):
        PairSettings("floats")  # type: ignore[arg-type]
    with pytest.raises(BitwrightError, match="no linear layers"):
        apply(nn.Sequential(nn.ReLU()), 4, None)
    made, _ = apply(network, 4, 4, run(batch()))
    with pytest.raises(InputError, match="NaN"):
        made(torch.full((1, 24), float("nan")))


def test_kept_layers_are_named_by_whole_parts():
    """The name lm_head keeps what is called so, anywhere in the model, and nothing whose name only contains it."""
    network = nn.ModuleDict({
        name: nn.Linear(8, 8) for name in ("lm_head", "not_lm_head", "lm_head_2", "first")
    } | {"inner": nn.ModuleDict({"lm_head": nn.Linear(8, 8), "lm_heads": nn.Linear(8, 8)})})  # fmt: skip
    _, replaced = apply(network, 4, None)
    assert {each.name for each in replaced} == {"not_lm_head", "lm_head_2", "first", "inner.lm_heads"}
    _, replaced = apply(network, 4, None, keep_float=("inner.lm_head", "first"))
    assert {each.name for each in replaced} == {"lm_head", "not_lm_head", "lm_head_2", "inner.lm_heads"}
