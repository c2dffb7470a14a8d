"""Layers of published vision transformers, against their published operation counts."""

import pytest

from bitwright.core.errors import InputError, UnknownNameError
from bitwright.models.multiplication_networks import NETWORKS, network_layers, tileable


def terms(layers, primitive=None):
    return sum(layer.terms for layer in layers if primitive in (None, layer.primitive))


# multiply-accumulates of one image, published with each network
@pytest.mark.parametrize(
    ("network", "billions"), [("DeiT-T", 1.3), ("DeiT-B", 17.6), ("PVTv1-T", 1.9), ("PVTv2-B0", 0.6)]
)
def test_operations_are_those_published(network, billions):
    assert terms(network_layers(network)) == pytest.approx(billions * 1e9, rel=0.06)


def test_products_of_one_stage_by_hand():
    layers = {layer.name: layer for layer in network_layers("PVTv2-B0")}
    assert layers["stages.0.scores"].operator.loops == {"b": 1, "m": 3136, "n": 49, "k": 32}
    assert layers["stages.0.key_value"].terms == 2 * 49 * 32 * 64
    assert layers["stages.0.reduction"].terms == 2 * 49 * 32 * 32 * 64
    assert layers["stages.1.depthwise"].terms == 2 * 784 * 512 * 9
    assert layers["stages.3.up"].terms == 2 * 49 * 256 * 1024
    plain = {layer.name: layer for layer in network_layers("PVTv2-B0", "softmax")}
    assert plain["stages.0.scores"].terms == 2 * 3136 * 3136 * 32
    linear = {layer.name: layer for layer in network_layers("PVTv2-B0", "additive")}
    assert linear["stages.2.keys_values"].terms == 2 * 5 * 196 * 32 * 32
    assert linear["stages.2.queries"].primitive == "add"
    assert linear["stages.2.neighbours"].terms == 2 * 160 * 196 * 9


@pytest.mark.parametrize("network", NETWORKS)
def test_conversions_keep_the_work_and_change_who_does_it(network):
    linear = network_layers(network, "linear")
    assert terms(linear, "multiply") == terms(linear)
    additive = network_layers(network, "additive", "shift", "mixture")
    assert terms(additive) == pytest.approx(terms(linear), rel=0.05)  # routers, token counts rounded up
    mlp = [layer for layer in additive if layer.part == "mlp" and layer.name.endswith((".multiply", ".shift"))]
    assert terms(mlp, "shift") / terms(mlp) == pytest.approx(0.6, abs=0.02)
    everything = network_layers(network, "additive", "shift", "mixture", shift_share=1.0)
    assert not any(layer.name.endswith(".multiply") for layer in everything)


def test_token_counts_that_tile():
    assert [tileable(n) for n in (1, 11, 49, 197, 3136, 1882)] == [1, 12, 49, 200, 3136, 1890]


def test_bad_input():
    with pytest.raises(UnknownNameError, match="network"):
        network_layers("LeNet")
    with pytest.raises(UnknownNameError, match="attention"):
        network_layers("DeiT-T", "sparse")
    with pytest.raises(UnknownNameError, match="primitive"):
        network_layers("DeiT-T", mlp="xor")
    with pytest.raises(InputError, match="0 to 1"):
        network_layers("DeiT-T", shift_share=1.5)
