"""Shapes of vision networks against published sizes and an independent implementation."""

import pytest
import torch

from bitwright.core.errors import InputError
from bitwright.core.workload import Role
from bitwright.models.vision_shapes import mobilenet_v3_large, mobilevit_s


def test_mobilenet_has_the_published_size():
    network = mobilenet_v3_large()
    assert network.macs == pytest.approx(219e6, rel=0.02)  # Howard et al. (2019), table 3
    biases = sum(size for name, (size, _) in network.tensors(Role.WEIGHT).items() if name.endswith(".bias"))
    head = 1280 + 1000
    excite = sum(
        size for name, (size, _) in network.tensors(Role.WEIGHT).items() if name.endswith(".bias") and "squeeze" in name
    )
    # torchvision's mobilenet_v3_large has 5,483,032 parameters: a scale beside every bias of a convolution.
    assert network.parameters + biases - head - excite == 5_483_032
    assert not network.unknown
    assert mobilenet_v3_large(batch=2).macs == 2 * network.macs


def test_mobilevit_equals_transformers():
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        reference = transformers.MobileViTForImageClassification(transformers.MobileViTConfig(num_labels=1000))
    scales = sum(p.numel() for name, p in reference.named_parameters() if name.endswith("normalization.weight"))
    network = mobilevit_s()
    assert network.parameters == sum(p.numel() for p in reference.parameters()) - scales
    assert network.macs == pytest.approx(2.0e9, rel=0.02)  # Mehta and Rastegari (2022), table of mobile CNNs and ViTs


def test_bad_input():
    with pytest.raises(InputError, match="batch of 0"):
        mobilenet_v3_large(0)
    with pytest.raises(InputError, match="multiple of 64"):
        mobilevit_s(image=250)
