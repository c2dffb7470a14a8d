"""The Triton version of the product of tiled words, in Triton's interpreter, against float64."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import numpy as np, torch
from bitwright.core.errors import InputError
from bitwright.kernels.sparse_matmul import TiledCSL
from bitwright.kernels.triton_sparse_matmul import matmul

rng = np.random.default_rng(0)
for m, k, n, sparsity in ((128, 64, 1, 0.8), (200, 150, 8, 0.7), (130, 200, 20, 0.9), (256, 64, 16, 1.0)):
    w = rng.normal(size=(m, k)).astype(np.float16)
    w[rng.random((m, k)) < sparsity] = 0
    b = rng.normal(size=(k, n)).astype(np.float16)
    found = matmul(TiledCSL.from_dense(w), torch.from_numpy(b)).numpy()
    exact = w.astype(float) @ b.astype(float)
    assert found.shape == (m, n), found.shape
    assert np.abs(found - exact).max() < 1e-4, (m, k, n, np.abs(found - exact).max())
form = TiledCSL.from_dense(w)
for wrong in (torch.ones(63, 2, dtype=torch.float16), torch.ones(64, 2), np.ones((64, 2), np.float16)):
    try:
        matmul(form, wrong)
    except InputError as error:
        assert "Activations are a float16 tensor" in str(error)
    else:
        raise AssertionError("taken")
full = TiledCSL.from_dense(np.ones((128, 64), np.float16))
try:
    matmul(full, torch.ones(64, 2, dtype=torch.float16))
except InputError as error:
    assert "most_words=8192" in str(error)
else:
    raise AssertionError("taken")
print("equal")
"""


def test_products_in_the_interpreter():
    pytest.importorskip("triton", reason="triton is not installed")
    # its own process: whether kernels are interpreted is settled when triton is imported
    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM], env=os.environ | {"TRITON_INTERPRET": "1"}, check=False,
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip() == "equal"
