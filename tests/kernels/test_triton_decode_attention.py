"""The Triton kernel, in Triton's interpreter, against the native one; in a process of its own, because the interpreter
is chosen when Triton is imported."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="triton is an optional package")

SCRIPT = """
import numpy as np, torch
from bitwright.core.errors import InputError
from bitwright.kernels import attention_partition as ap
from bitwright.kernels.decode_attention import decode_attention as native
from bitwright.kernels.triton_decode_attention import decode_attention

torch.manual_seed(0)
for heads, kv_heads, channels, lengths in ((4, 2, 32, [70, 33]), (3, 1, 20, [100, 0]), (2, 2, 64, [17, 48])):
    q = torch.randn(2, heads, channels)
    k, v = torch.randn(2, 2, kv_heads, 100, channels)
    expected = native(q, k, v, lengths, return_lse=True)
    tiles = ap.tiles_of(lengths, kv_heads, 16)
    for schedule, workers in (("lean", 1), ("lean", 3), ("lean", int(tiles.sum())), ("fixed", 4), ("whole", 1)):
        made = ap.partition(schedule, tiles, workers, 3)
        found = decode_attention(q, k, v, torch.tensor(lengths), made, 16)
        for one, other in zip(found, expected):
            assert torch.allclose(one, other, atol=1e-5), (schedule, workers, heads)
try:
    decode_attention(q, k, v, torch.tensor(lengths), made, 24)
except InputError:
    print("all equal")
"""


def test_equals_the_native_kernel():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert done.stdout.strip() == "all equal", done.stderr[-2000:]
