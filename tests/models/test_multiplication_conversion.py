"""Conversion of a small vision transformer to shifts and additions."""

import pytest
import torch
from torch import nn

from bitwright.core.errors import BitwrightError, InputError, UnknownNameError
from bitwright.models import multiplication_conversion
from bitwright.models.binary_attention import BinaryLinearAttention, HashSettings
from bitwright.models.multiplication_conversion import (
    SmallVisionTransformer,
    SoftmaxAttention,
    accuracy,
    additive,
    convert_in_stages,
    fit_hashes,
    measured_latencies,
    mixture,
    mixtures,
    packed,
    shift_share,
    shifting,
    train,
)
from bitwright.models.multiplication_primitives import MixtureOfPrimitives, PackedShiftLinear, ShiftLinear


def stripes(count, seed=0):
    """Images with a bright row or a bright column: two classes."""
    generator = torch.Generator().manual_seed(seed)
    images = 0.3 * torch.rand((count, 8, 8), generator=generator)
    labels, places = (
        torch.randint(0, 2, (count,), generator=generator),
        torch.randint(0, 8, (count,), generator=generator),
    )
    for image, label, place in zip(images, labels, places, strict=True):
        image[place] += label
        image[:, place] += 1 - label
    return images, labels


def kinds(model, kind):
    return sum(isinstance(module, kind) for module in model.modules())


def test_softmax_attention_is_that_of_torch():
    torch.manual_seed(0)
    ours, x = SoftmaxAttention(12, 3), torch.randn(2, 5, 12)
    peer = nn.MultiheadAttention(12, 3, batch_first=True)
    with torch.no_grad():
        peer.in_proj_weight.copy_(torch.cat([each.weight for each in (ours.query, ours.key, ours.value)]))
        peer.in_proj_bias.copy_(torch.cat([each.bias for each in (ours.query, ours.key, ours.value)]))
        peer.out_proj.load_state_dict(ours.output.state_dict())
    assert torch.allclose(ours(x), peer(x, x, x, need_weights=False)[0], atol=1e-6)


def test_stages_replace_what_they_say():
    model = SmallVisionTransformer()
    linear = additive(model)
    assert kinds(model, SoftmaxAttention) == kinds(linear, BinaryLinearAttention) == 2
    assert kinds(linear, SoftmaxAttention) == 0
    assert torch.equal(linear.blocks[0].attention.query.weight, model.blocks[0].attention.query.weight)
    moved = shifting(linear)
    assert kinds(moved, ShiftLinear) == kinds(linear.blocks, nn.Linear) == 12
    assert kinds(moved.blocks, nn.Linear) == 0
    mixed = mixture(linear)
    assert kinds(mixed, MixtureOfPrimitives) == 12
    assert isinstance(mixed.head, nn.Linear)
    images, _ = stripes(4)
    for each in (linear, moved, mixed):
        assert each(images).shape == (4, 10)


HASHING = HashSettings(bits=8, supports=12, iterations=5, neighbours=4)


def test_hashed_attention_is_fitted_and_packed():
    torch.manual_seed(0)
    model, (images, _) = SmallVisionTransformer(), stripes(20)
    model.train()
    linear = additive(model, "hash", images[:8], HASHING, sparse_above=0.02)
    attention = [block.attention for block in linear.blocks]
    assert all(bool(each.hash.fitted) and each.key is None and each.sparse_above == 0.02 for each in attention)
    assert torch.equal(attention[0].query.weight, model.blocks[0].attention.query.weight)
    assert linear.training
    first = linear.blocks[
        0
    ].before_attention(  # what the first attention gets
        model.embed(images[:8].unfold(1, 2, 2).unfold(2, 2, 2).reshape(8, 16, 4)) + model.positions
    )
    alone = BinaryLinearAttention(32, 2, quantiser="hash", hashing=HASHING)
    alone.query.load_state_dict(attention[0].query.state_dict())
    alone.fit_hash(first)
    assert torch.allclose(alone.hash.projection, attention[0].hash.projection, atol=1e-5)
    again = additive(model, "hash", images[:8], HASHING)
    assert torch.equal(again.blocks[1].attention.hash.projection, attention[1].hash.projection)
    other = additive(model, "hash", images[:8], HASHING, seed=1)
    assert not torch.equal(other.blocks[1].attention.hash.projection, attention[1].hash.projection)
    linear.eval()
    assert torch.allclose(packed(linear)(images), linear(images), atol=1e-4)
    with pytest.raises(InputError, match="give images"):
        additive(model, "hash")
    with pytest.raises(BitwrightError, match="no attention with a hash"):
        fit_hashes(additive(model), images)


def test_two_powers_in_a_network():
    torch.manual_seed(0)
    model = SmallVisionTransformer().eval()
    images, _ = stripes(20)
    one, two = shifting(model).eval(), shifting(model, 2).eval()
    assert {each.terms for each in two.modules() if isinstance(each, ShiftLinear)} == {2}
    exact = model(images)
    assert (two(images) - exact).norm() < 0.5 * (one(images) - exact).norm()
    assert (packed(two)(images) - two(images)).abs().max() < 2e-2
    with pytest.raises(InputError, match="3 terms"):
        shifting(model, 3)


def test_variants_of_a_conversion(tmp_path):
    images, labels = stripes(64)
    made = convert_in_stages(images, labels, 0, 1, tmp_path, stages=("additive",), quantiser="hash", hashing=HASHING)
    assert list(made) == ["multiply", "additive"]
    more = convert_in_stages(images, labels, 0, 1, tmp_path, stages=("shift",), terms=2)
    assert list(more) == ["multiply", "additive", "shift"]
    names = ("multiply-0", "additive-hash-0", "additive-0", "shift-two-0")
    assert sorted(path.stem for path in tmp_path.iterdir()) == sorted(names)
    again = convert_in_stages(images, labels, 0, 1, tmp_path, stages=("additive",), quantiser="hash", hashing=HASHING)
    assert torch.equal(made["additive"](images), again["additive"](images))
    assert bool(again["additive"].blocks[1].attention.hash.fitted)
    with pytest.raises(UnknownNameError):
        convert_in_stages(images, labels, 0, 1, stages=("shifts",))


def test_mixtures_start_near_the_layers_they_replace():
    torch.manual_seed(0)
    linear = additive(SmallVisionTransformer()).eval()
    layer = linear.blocks[0].up
    made = mixture(linear).eval().blocks[0].up
    x = torch.randn(200, 32)
    apart = (made(x) - layer(x)).norm(dim=1) / layer(x).norm(dim=1)
    multiplied = made.last[0].argmax(-1) == 0
    assert apart[multiplied].max() < 0.35  # the gate alone
    assert apart.median() < 0.35


def test_packed_models_answer_as_the_rebuilt_ones():
    torch.manual_seed(0)
    linear = additive(SmallVisionTransformer()).eval()
    images, _ = stripes(20)
    for model in (linear, shifting(linear).eval(), mixture(linear).eval()):
        native = packed(model)
        assert kinds(native, ShiftLinear) == 0
        assert kinds(native, PackedShiftLinear) == kinds(model, ShiftLinear)
        assert kinds(model, PackedShiftLinear) == 0
        made = native(images)
        apart = (made - model(images)).abs().max()
        assert 0 < apart < 2e-2  # fixed point of the activations; a code may change sides
    with pytest.raises(BitwrightError, match="no shift layers"):
        packed(SmallVisionTransformer())


def test_latencies_are_measured():
    multiplying, shifting_layer = measured_latencies(16, 8, 32, repeats=2)
    assert min(multiplying, shifting_layer) > 0
    made = mixture(additive(SmallVisionTransformer()), (multiplying, shifting_layer))
    shares = next(mixtures(made)).shares
    assert shares[0] / shares[1] == pytest.approx(multiplying / shifting_layer, rel=1e-5)
    asked = []
    of_shape = mixture(SmallVisionTransformer(), lambda *shape: asked.append(shape) or (float(shape[0]), 1.0))
    assert asked == [(32, 32)] * 4 + [(32, 64), (64, 32)] + [(32, 32)] * 4 + [(32, 64), (64, 32)]
    assert of_shape.blocks[0].down.shares[0] == pytest.approx(64 / 65)
    with pytest.raises(InputError, match="0 tokens"):
        measured_latencies(16, 8, 0)


def test_an_interrupted_conversion_goes_on(tmp_path):
    images, labels = stripes(64)
    made = convert_in_stages(images, labels, 0, epochs=1, folder=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(f"{stage}-0.safetensors" for stage in made)
    (tmp_path / "shift-0.safetensors").unlink()
    again = convert_in_stages(images, labels, 0, epochs=1, folder=tmp_path)
    for stage, model in made.items():
        assert torch.equal(model(images[:9]), again[stage](images[:9]))
    with pytest.MonkeyPatch.context() as patched:  # nothing is trained again
        patched.setattr(multiplication_conversion, "train", None)
        kept = convert_in_stages(images, labels, 0, epochs=1, folder=tmp_path)
    assert torch.equal(made["mixture"](images[:9]), kept["mixture"](images[:9]))


@pytest.mark.parametrize(
    ("options", "match"),
    [({"epochs": 2}, "multiply-0.safetensors was made with other epochs"),
     ({"balance": 0.5}, "mixture-0.safetensors was made with other balance"),
     ({"latencies": (1.0, 1.0)}, "mixture-0.safetensors was made with other latencies"),
     ({"sparse_above": 0.1}, None)],
)  # fmt: skip
def test_stages_of_other_settings_are_not_taken(tmp_path, options, match):
    images, labels = stripes(32)
    convert_in_stages(images, labels, 0, epochs=1, folder=tmp_path, stages=("mixture",))
    again = {"epochs": 1, "folder": tmp_path, "stages": ("mixture",), **options}
    if match is None:  # kept under another name
        assert len(convert_in_stages(images, labels, 0, **again)) == 3
        again["sparse_above"], match = 0.2, "additive-sparse-0.safetensors was made with other sparse_above"
    with pytest.raises(InputError, match=match):
        convert_in_stages(images, labels, 0, **again)
    with pytest.raises(InputError, match="other images and labels"):
        convert_in_stages(images + 0.1, labels, 0, epochs=1, folder=tmp_path)


def test_a_hash_of_other_settings_is_not_taken(tmp_path):
    images, labels = stripes(32)
    options = {"epochs": 1, "folder": tmp_path, "stages": ("additive",), "quantiser": "hash"}
    convert_in_stages(images, labels, 0, hashing=HASHING, **options)
    with pytest.raises(InputError, match=r"additive-hash-0\.safetensors was made with other hashing"):
        convert_in_stages(images, labels, 0, hashing=HashSettings(8, 12, 6, 4), **options)


@pytest.mark.parametrize("size", [0, 4, 300, -1])
def test_a_damaged_stage_is_named(tmp_path, size):
    images, labels = stripes(32)
    convert_in_stages(images, labels, 0, epochs=1, folder=tmp_path, stages=("multiply",))
    path = tmp_path / "multiply-0.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(InputError, match=r"Cannot read the kept stage .*multiply-0\.safetensors.*delete it"):
        convert_in_stages(images, labels, 0, epochs=1, folder=tmp_path)


@pytest.mark.slow
def test_conversion_learns():
    images, labels = stripes(256)
    made, tested = convert_in_stages(images, labels, 0, epochs=4), stripes(128, seed=1)
    assert accuracy(made["multiply"], *tested) > 0.9
    assert accuracy(made["additive"], *tested) > 0.8


@pytest.mark.slow
def test_routers_follow_the_latencies_only_with_the_balance_term():
    images, labels = stripes(256)
    shares = []
    for balance in (0.3, 0.0):
        torch.manual_seed(1)
        model = mixture(SmallVisionTransformer())
        with torch.no_grad():
            for each in mixtures(model):
                each.router.bias.copy_(torch.tensor([1.0, 0.0]))  # all to the multiplying experts at first
        train(model, images, labels, 12, 3e-3, balance=balance)
        shares.append(shift_share(model, images))
    assert abs(shares[0] - 0.6) < 0.1
    assert abs(shares[1] - 0.6) > 0.1


def test_bad_input():
    with pytest.raises(InputError, match="3 heads"):
        SoftmaxAttention(10, 3)
    with pytest.raises(InputError, match="Patches of 3"):
        SmallVisionTransformer(patch=3)
    with pytest.raises(BitwrightError, match="no SoftmaxAttention"):
        additive(additive(SmallVisionTransformer()))
    with pytest.raises(BitwrightError, match="no mixtures"):
        shift_share(SmallVisionTransformer(), stripes(2)[0])
    with pytest.raises(InputError, match="2 images and 3 labels"):
        train(SmallVisionTransformer(), torch.zeros(2, 8, 8), torch.zeros(3, dtype=torch.int64), 1, 1e-3)
