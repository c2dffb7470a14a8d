"""Shared models: loaded once for this folder's tests."""

import os

import pytest
import torch
from tiny_decoder import TINY

from bitwright.models.decoder import Decoder
from bitwright.models.load import LoadedModel, load

os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def smollm2() -> LoadedModel:
    return load("smollm2-135m")


@pytest.fixture
def tiny() -> Decoder:
    torch.manual_seed(3)
    model = Decoder(TINY).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.copy_(torch.randn(parameter.shape) * 0.3)
    return model
