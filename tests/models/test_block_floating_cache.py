"""What a packed cache refuses to store."""

import pytest
import torch
from torch import nn

from bitwright.core.errors import InputError
from bitwright.models.block_floating_cache import BfpKVCache
from bitwright.models.decoder import DecoderConfig
from bitwright.models.multiplication_primitives import ShiftLinear


@pytest.mark.parametrize("keys", ["bfp12_32", None])
@pytest.mark.parametrize(
    "shape", [(2, 2, 3, 64), (1, 1, 3, 128), (1, 2, 3, 32), (1, 2, 64), (1, 4, 3, 32), (1, 2, 0, 64)]
)
def test_keys_of_other_shapes(keys, shape):
    config = DecoderConfig(vocabulary=8, hidden=128, layers=1, heads=2, kv_heads=2, head_dim=64, feed_forward=8)
    cache = BfpKVCache(config, 1, 16, keys, "bfp12_32")
    good, bad = torch.randn(1, 2, 3, 64), torch.randn(shape)
    for pair in ((bad, good), (good, bad)):
        with pytest.raises(InputError, match="do not fit the cache"):
            cache.append(0, *pair)
    for pair in ((good * float("nan"), good), (good, good * float("nan"))):
        with pytest.raises(InputError, match="NaN or infinity"):
            cache.append(0, *pair)
    assert cache.append(0, good, good)[0].shape == good.shape


def test_weights_that_no_power_of_two_stands_for():
    layer = nn.Linear(4, 4)
    layer.weight.data[1, 2] = float("nan")
    with pytest.raises(InputError, match="NaN or infinity"):
        ShiftLinear.from_linear(layer)
