"""Cases of `bitwright kernels bench` for decode attention and gated linear attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bitwright.kernels.benchmark import Case


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
