"""A sequence over three processes against one process."""

import subprocess
import sys

import pytest
import torch

from bitwright.core.errors import BitwrightError, InputError
from bitwright.parallel.state_scan import state_scan

SCRIPT = """
import sys
import torch, torch.distributed as dist
from bitwright.kernels.gated_linear_attention import gla
from bitwright.parallel.state_scan import state_scan

rank, port = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{port}", rank=rank, world_size=3)
torch.manual_seed(0)
q, k = torch.randn(2, 1, 90, 2, 16)
v, gates = torch.randn(1, 90, 2, 24), -torch.rand(1, 90, 2, 16)
mine = [each[:, rank * 30 : rank * 30 + 30] for each in (q, k, v, gates)]
state = gla(*mine, mode="chunk", return_state=True)[1]
start = state_scan(state, mine[3].sum(1).exp())
found = gla(*mine, mode="chunk", initial_state=start)
whole = gla(q, k, v, gates, mode="chunk")[:, rank * 30 : rank * 30 + 30]
assert (found - whole).abs().max() < 1e-6 * whole.abs().max()
assert start.nbytes == 4 * 2 * 16 * 24
dist.destroy_process_group()
"""


def test_three_processes_equal_one(tmp_path):
    running = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(rank), str(tmp_path / "meet")], stderr=subprocess.PIPE, text=True
        )
        for rank in range(3)
    ]
    for each in running:
        _, errors = each.communicate(timeout=120)
        assert each.returncode == 0, errors[-2000:]


def test_bad_input():
    with pytest.raises(InputError, match="do not fit"):
        state_scan(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 4))
    with pytest.raises(BitwrightError, match="torchrun"):
        state_scan(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3))
