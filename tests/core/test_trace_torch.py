from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bitwright.core.errors import InputError
from bitwright.core.trace_torch import trace_torch
from bitwright.core.workload import Kind, Role


class Layer(nn.Module):
    """Grouped-query attention, a norm, a gather, a scan and an einsum."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 32)
        self.query, self.key, self.value = nn.Linear(32, 32), nn.Linear(32, 16), nn.Linear(32, 16)
        self.norm = nn.LayerNorm(32)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.table(ids))
        q, k, v = (f(x).unflatten(-1, (-1, 8)).transpose(1, 2) for f in (self.query, self.key, self.value))
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        y = y.transpose(1, 2).flatten(2)
        return torch.einsum("bij,bkj->bik", torch.cumsum(y, 1), x)


NETWORKS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "convolutions": (
        nn.Sequential(
            nn.Conv2d(4, 8, 3, 2, 1, groups=2), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 8, 5, groups=8, dilation=2, padding=4), nn.MaxPool2d(2), nn.ConvTranspose2d(8, 6, 4, 2, 1),
            nn.Flatten(2), nn.Conv1d(6, 5, 3), nn.AdaptiveAvgPool1d(1),
        ),
        (3, 4, 17, 19),
    ),
    "volumes": (nn.Sequential(nn.Conv3d(2, 4, 3), nn.ConvTranspose3d(4, 3, (2, 3, 1))), (1, 2, 6, 7, 8)),
    "recurrent": (nn.GRU(8, 12, batch_first=True), (2, 5, 8)),
    "transformer layer": (nn.TransformerEncoderLayer(32, 4, batch_first=True), (2, 7, 32)),
    "attention": (nn.MultiheadAttention(32, 4, batch_first=True), (2, 7, 32)),
}  # fmt: skip


def counted(network: nn.Module, *inputs: torch.Tensor, **keywords: Any) -> int:
    """Operations as torch counts them; its counter does not know the fused attention of CPUs."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        network(*inputs, **keywords)
    return int(counter.get_total_flops())


@pytest.mark.parametrize("name", NETWORKS)
def test_work_equals_the_flop_counter(name: str) -> None:
    network, shape = NETWORKS[name]
    inputs = (torch.zeros(shape),) * (3 if name == "attention" else 1)
    workload = trace_torch(network.eval(), inputs)
    assert 2 * workload.macs == counted(network, *inputs) > 0
    assert not workload.notes
    stored = {*(n for n, _ in network.named_parameters()), *(n for n, _ in network.named_buffers())}
    assert set(workload.tensors(Role.WEIGHT)) <= stored
    assert sum(each.numel() for each in network.parameters()) <= workload.parameters


def test_grouped_query_attention_counts_shared_heads_once() -> None:
    workload = trace_torch(Layer().eval(), (torch.zeros(2, 6, dtype=torch.int64),))
    assert 2 * workload.macs == counted(Layer().eval(), torch.zeros(2, 6, dtype=torch.int64))
    (each,) = [one for one in workload if one.kind is Kind.ATTENTION]
    query, key, value = (tensor.bytes(each.loops) for tensor in each.inputs)
    assert (query, key, value) == (4 * 2 * 4 * 6 * 8, 4 * 2 * 2 * 6 * 8, 4 * 2 * 2 * 6 * 8)
    assert each.density == pytest.approx(21 / 36)  # 1 + 2 + .. + 6 of 6 x 6
    kinds = {one.kind for one in workload}
    assert {Kind.GATHER, Kind.NORMALISATION, Kind.SCAN, Kind.MATMUL} <= kinds
    (table,) = [one for one in workload if one.kind is Kind.GATHER]
    assert table.bytes_read == 2 * 6 * 8 + 4 * 2 * 6 * 32  # ids and the rows they pick, not the table
    names = [one.name for one in workload]
    edges = {(names[a], names[b]) for a, b in workload.edges()}
    attention = each.name
    assert {a for a, b in edges if b == attention} == {n for n in names if n.split(".")[0] in ("query", "key", "value")}


def test_gemm_bytes_by_hand() -> None:
    workload = trace_torch(nn.Linear(64, 48, dtype=torch.bfloat16), (torch.zeros(2, 5, 64, dtype=torch.bfloat16),))
    (each,) = workload
    assert each.bytes == 2 * (10 * 64 + 64 * 48 + 48 + 10 * 48)
    assert each.gemms()[0].macs == each.macs == 10 * 64 * 48


def test_convolution_reads_only_what_its_stride_touches() -> None:
    workload = trace_torch(nn.Conv2d(4, 8, 1, stride=2, bias=False), (torch.zeros(1, 4, 8, 8),))
    assert workload.bytes == 4 * (4 * 4 * 4 + 8 * 4 + 8 * 4 * 4)


def test_a_network_that_does_not_fit_in_memory() -> None:
    with torch.device("meta"):
        network = nn.Sequential(*(nn.Linear(65536, 65536, bias=False) for _ in range(16)))
        workload = trace_torch(network, (torch.empty(1, 65536),))
    assert workload.parameters == 16 * 65536**2  # 275 GB in fp32
    assert workload.edges() == [(index, index + 1) for index in range(15)]


def test_transformers_llama_on_meta() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=96,
        vocab_size=128,
    )  # fmt: skip
    ids = torch.zeros(2, 16, dtype=torch.int64)
    real = transformers.LlamaForCausalLM(config).eval()
    with torch.device("meta"):
        network = transformers.LlamaForCausalLM(config).eval()
        workload = trace_torch(network, (), keywords={"input_ids": ids.to("meta"), "use_cache": False})
    assert 2 * workload.macs == counted(real, input_ids=ids, use_cache=False)
    assert not workload.unknown


class Odd(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.inv(x).relu()


def test_unknown_operation_is_kept_and_named() -> None:
    workload = trace_torch(Odd(), (torch.eye(4),))
    assert workload.unknown
    assert workload.unknown[0].bytes_read == 64
    assert "inv" in " ".join(workload.notes)
    assert workload.operators[-1].kind is Kind.ELEMENTWISE
    assert len(workload.edges()) == len(workload) - 1


class Branch(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.sum() > 0 else -x


def test_bad_input() -> None:
    with pytest.raises(InputError, match="Branch cannot be exported"):
        trace_torch(Branch(), (torch.zeros(3),))
    with pytest.raises(InputError, match="cannot be exported"):
        trace_torch(nn.Linear(4, 4), (torch.zeros(2, 5),))
    with pytest.raises(InputError, match="every extent"):
        trace_torch(nn.Linear(4, 4), (torch.zeros(0, 4),))
