"""Cases of `bitwright kernels bench` for attention, gated linear attention and kept activations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bitwright.kernels.benchmark import Case
from bitwright.kernels.work import Work


def decode_attention() -> list[Case]:
    """One token against long caches: one head, a group of eight heads, and a ragged batch, in float32 and float16."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    from bitwright.kernels.decode_attention import decode_attention as attend
    from bitwright.kernels.decode_attention_cost import DecodeShape, decode_work

    generator = torch.Generator().manual_seed(0)
    cases = []
    for title, lengths, heads, kv_heads, kind in (
        ("1 head, 64k tokens, fp32", (65536,), 1, 1, torch.float32),
        ("8 heads over 1, 64k tokens, fp32", (65536,), 8, 1, torch.float32),
        ("1 head, 64k tokens, fp16", (65536,), 1, 1, torch.float16),
        ("ragged, 8 heads over 2, 1k to 32k tokens, fp32", (32768, 1024, 3000, 9000), 8, 2, torch.float32),
    ):
        q = torch.randn(len(lengths), heads, 128, generator=generator).to(kind)
        k, v = (torch.randn(len(lengths), kv_heads, max(lengths), 128, generator=generator).to(kind) for _ in range(2))
        rows = q.view(len(lengths), kv_heads, heads // kv_heads, 128)

        def torch_each(threads: int, rows: Any = rows, k: Any = k, v: Any = v, lengths: Any = lengths) -> Any:
            return torch.cat([scaled_dot_product_attention(rows[i : i + 1], k[i : i + 1, :, :n], v[i : i + 1, :, :n])
                              for i, n in enumerate(lengths)])  # fmt: skip

        def run(threads: int, q: Any = q, k: Any = k, v: Any = v, lengths: Any = lengths, how: str = "lean") -> Any:
            return attend(q, k, v, lengths, schedule=how, threads=threads)

        def by_head(threads: int, run: Any = run) -> Any:
            return run(threads, how="whole")

        def fixed(threads: int, run: Any = run) -> Any:
            return run(threads, how="fixed")

        shape = DecodeShape(lengths, heads, kv_heads, 128, k.element_size())
        peers: dict[str, Callable[[int], Any]] = {
            "a worker per head": by_head,
            "fixed splits": fixed,
            "torch SDPA": torch_each,
        }
        cases.append(Case("decode-attention", title, run, peers, decode_work(shape, pieces=8)))
    return cases


def attention() -> list[Case]:
    """Attention in tiles beside torch's: 12 heads of 64 channels, causal forward and backward, and a window of 256."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    from bitwright.kernels.attention import flash, work

    tokens, heads, channels = 2048, 12, 64
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, tokens, heads, channels)
    rows = [each.transpose(1, 2).contiguous() for each in (q, k, v)]
    place = torch.arange(tokens)
    near = (place[None] <= place[:, None]) & (place[None] > place[:, None] - 256)

    def step(call: Callable[..., Any], given: Any) -> Any:
        leaves = [each.detach().requires_grad_() for each in given]
        call(*leaves).sum().backward()
        return leaves[0].grad

    def torch_causal(query: Any, key: Any, value: Any) -> Any:
        return scaled_dot_product_attention(query, key, value, is_causal=True)

    def torch_near(threads: int) -> Any:
        return scaled_dot_product_attention(rows[0], rows[1], rows[2], attn_mask=near)

    sizes, seen = (1, tokens, heads, channels), (255, 0)
    both = [work(*sizes, causal=True, backward=backward) for backward in (False, True)]
    training = Work(
        {kind: sum(each.operations[kind] for each in both) for kind in both[0].operations},
        {"memory": sum(each.traffic["memory"] for each in both)}, pieces=min(each.pieces for each in both),
    )  # fmt: skip
    title = f"{heads} heads of {channels}, {tokens} tokens"
    return [
        Case("attention", f"{title}, causal", lambda threads: flash(q, k, v, causal=True, threads=threads),
             {"torch SDPA": lambda threads: torch_causal(*rows)}, work(*sizes, causal=True)),
        Case("attention", f"{title}, causal, with gradients",
             lambda threads: step(lambda *given: flash(*given, causal=True, threads=threads), (q, k, v)),
             {"torch SDPA": lambda threads: step(torch_causal, rows)}, training),
        Case("attention", f"{title}, 256 tokens back",
             lambda threads: flash(q, k, v, window=seen, threads=threads),
             {"torch SDPA, mask": torch_near},
             work(*sizes, window=seen)),
    ]  # fmt: skip


def kept_activations() -> list[Case]:
    """Scores of 8 heads, a training step's activations, to 8 and 2 bits and back, beside a copy."""
    import torch

    from bitwright.kernels.activation_quantisation import dequantise, group_layout, group_ranges, quantise

    torch.manual_seed(0)
    x = torch.randn(32, 8, 128, 128)
    layout = group_layout(tuple(x.shape), 8)
    low, span = group_ranges(x, layout)
    into = torch.empty_like(x)
    cases = []
    for bits in (8, 2):

        def run(threads: int, bits: int = bits) -> Any:
            return dequantise(quantise(x, layout, low, span, bits, threads=threads), threads)

        moved = x.numel() * (4 + bits / 8 + bits / 8 + 4)
        cases.append(Case(
            "kept-activations", f"4 M values to {bits} bits and back", run,
            {"torch copy": lambda threads: into.copy_(x), "torch per-tensor int8": lambda threads: _per_tensor(x)},
            Work({"fp32": 12.0 * x.numel()}, {"memory": moved}, pieces=64),
        ))  # fmt: skip
    return cases


def _per_tensor(x: Any) -> Any:
    """To int8 codes of one scale and back, by torch."""
    import torch

    scale = x.abs().max() / 127
    return torch.round(x / scale).clamp_(-127, 127).to(torch.int8).float().mul_(scale)


def gated_linear_attention() -> list[Case]:
    """Chunks beside the recurrence and softmax attention: 4 heads of 64 by 64 and 2 of 256 by 512 channels."""
    import torch
    from torch.nn.functional import logsigmoid, scaled_dot_product_attention

    from bitwright.kernels.gated_linear_attention import gla, work

    cases = []
    for heads, keys, values, tokens in ((4, 64, 64, 4096), (2, 256, 512, 1024)):
        torch.manual_seed(0)
        q, k = torch.randn(2, 1, tokens, heads, keys)
        v, gates = torch.randn(1, tokens, heads, values), logsigmoid(torch.randn(1, tokens, heads, keys)) / 16
        wide = torch.randn(3, 1, heads, tokens, values)

        def run(threads: int, given: Any = (q, k, v, gates), mode: str = "chunk") -> Any:
            return gla(*given, mode=mode, threads=threads)

        def recurrence(threads: int, run: Any = run) -> Any:
            return run(threads, mode="recurrent")

        def softmax(threads: int, wide: Any = wide) -> Any:
            return scaled_dot_product_attention(wide[0], wide[1], wide[2], is_causal=True)

        cases.append(Case(
            "gated-linear-attention", f"{heads} heads of {keys} by {values}, {tokens} tokens", run,
            {"native recurrence": recurrence, "torch softmax attention": softmax}, work(1, tokens, heads, keys, values),
        ))  # fmt: skip
    return cases
