"""Layers in the place of others: the whole model, layers under several names, and states that hold no weights."""

import pytest
import torch
from torch import nn

from bitwright.compression import outlier_victim_pairs
from bitwright.core.errors import InputError
from bitwright.models.bit_plane_linear import BitPlaneLinear, bit_plane_execution
from bitwright.models.format_execution import FormatAssignment, FormatLinear, execute_in, format_attention
from bitwright.models.integer import IntegerLinear, integer_execution
from bitwright.models.late_dequantised_linear import LateDequantisedLinear, late_dequantised
from bitwright.models.logarithmic_layers import LogarithmicLinear, with_logarithmic_products
from bitwright.models.replacement import replace_module

CONVERSIONS = {
    FormatLinear: lambda model: execute_in(model, FormatAssignment("int4/32", "int4/32")),
    IntegerLinear: integer_execution,
    BitPlaneLinear: lambda model: bit_plane_execution(model, 4, 4),
    LateDequantisedLinear: late_dequantised,
    LogarithmicLinear: lambda model: with_logarithmic_products(model, "linear", 3),
    outlier_victim_pairs.PairLinear: lambda model: outlier_victim_pairs.apply(model, 4, None)[0],
}


@pytest.mark.parametrize("kind", list(CONVERSIONS), ids=lambda kind: kind.__name__)
def test_a_model_that_is_one_layer(kind):
    torch.manual_seed(0)
    layer, x = nn.Linear(32, 16), torch.randn(3, 32)
    converted = CONVERSIONS[kind](layer)
    assert isinstance(converted, kind)
    assert type(layer) is nn.Linear
    assert not torch.equal(converted(x), layer(x))


@pytest.mark.parametrize("kind", list(CONVERSIONS), ids=lambda kind: kind.__name__)
def test_a_layer_under_two_names(kind):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Module()
            self.first = self.inner.second = nn.Linear(32, 32)

        def forward(self, x):
            return self.inner.second(self.first(x))

    converted = CONVERSIONS[kind](Twice())
    assert isinstance(converted.first, kind)
    assert converted.first is converted.inner.second


def test_replaced_everywhere_and_only_there():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    made = nn.Identity()
    assert replace_module(model, "2", made) is model
    assert isinstance(model[0], nn.Linear)
    assert model[2] is made
    assert replace_module(model, "", made) is made


@pytest.mark.parametrize("kind", [FormatLinear, LateDequantisedLinear, outlier_victim_pairs.PairLinear])
def test_states_without_weights_are_not_loaded(kind):
    one, two = (CONVERSIONS[kind](nn.Sequential(nn.Linear(32, 16))) for _ in range(2))
    with pytest.raises(InputError, match="convert it"):
        two.load_state_dict(one.state_dict())


def test_values_as_wide_as_they_are():
    q, k = torch.randn(1, 4, 5, 32), torch.randn(1, 2, 7, 32)
    for width in (16, 64):
        v = torch.randn(1, 2, 7, width)
        exact = nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        for assignment in (FormatAssignment(attention="int8/row", keys="int8/row", values="int8/row"),
                           FormatAssignment(attention="mxint8"), FormatAssignment(values="int8/row")):  # fmt: skip
            found = format_attention(q, k, v, enable_gqa=True, assignment=assignment, exact=False)
            assert found.shape == exact.shape
            assert (found - exact).norm() < 0.05 * exact.norm()


def test_exact_products_have_no_other_sums():
    with pytest.raises(InputError, match="summed exactly"):
        execute_in(nn.Linear(8, 8), FormatAssignment("int8/row", "int8/row", accumulation="bf16"), exact=True)


CONVERTED = {
    **CONVERSIONS,
    LogarithmicLinear: lambda model: with_logarithmic_products(model, "all", 3),
}


@pytest.mark.parametrize("kind", list(CONVERTED), ids=lambda kind: kind.__name__)
@pytest.mark.parametrize(
    ("make", "name"),
    [(lambda: nn.Sequential(nn.Linear(8, 8), nn.TransformerEncoderLayer(8, 2, 16)), "1.self_attn"),
     (lambda: nn.MultiheadAttention(8, 2), "The model")],
    ids=["inside", "alone"],
)  # fmt: skip
def test_joint_projections_are_refused(kind, make, name):
    with pytest.raises(InputError, match=f"^{name} is nn.MultiheadAttention"):
        CONVERTED[kind](make())


@pytest.mark.parametrize("exact", [False, True])
def test_zero_points_of_attention_values(exact):
    """Values far from zero: what a product of codes has too much is taken off again, in every group."""
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 4, 5, 32), torch.randn(1, 2, 7, 32), torch.randn(1, 2, 7, 32)
    v = v + torch.linspace(-20, 30, 32)
    assignment = FormatAssignment(attention="int8/row", keys="int8/row", values="uint8/16")
    found = format_attention(q, k, v, enable_gqa=True, assignment=assignment, exact=exact)
    exactly = nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    assert (found - exactly).abs().max() < 0.5
