"""MiniLM without padding beside what a user would pick for sentences of different length, interleaved in one run.

    python benchmarks/packed_encoder.py [--batch 16] [--threads 1 2] [--repeats 9]

Peers, all with MiniLM's weights in float32: our padded encoder (PyTorch linear layers and fused attention), the same on
four buckets of similar length, PyTorch's `TransformerEncoder` with nested tensors (its fast path), and ONNX Runtime on
the padded batch (where installed). Lengths: "skewed" (mean 0.41 of the longest), "uniform" (0.2 to 1, mean 0.6), "even"
(all the longest). Medians; hidden states of real tokens are compared with the padded encoder's. Writes
benchmarks/results/packed_encoder.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import nn

from bitwright.core.files import write_json
from bitwright.models.encoder import Encoder
from bitwright.models.load import load
from bitwright.models.packed_encoder import PackedEncoder

RESULT = Path(__file__).parent / "results" / "packed_encoder.json"


def lengths(kind: str, batch: int, longest: int) -> torch.Tensor:
    """Seeded lengths of a batch; the first is the longest."""
    generator = torch.Generator().manual_seed(1)
    drawn = torch.rand(batch, generator=generator)
    given = {
        "skewed": (drawn**1.5 * longest).long().clamp(1),
        "uniform": ((0.2 + 0.8 * drawn) * longest).long().clamp(1),
        "even": torch.full((batch,), longest),
    }[kind]
    given[0] = longest
    return given


def nested(encoder: Encoder) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """PyTorch's encoder with the same weights; its fast path packs padded batches into nested tensors."""
    config = encoder.config
    layer = nn.TransformerEncoderLayer(
        config.hidden, config.heads, config.feed_forward, activation="gelu", batch_first=True,
        layer_norm_eps=config.norm_eps,
    )  # fmt: skip
    stack = nn.TransformerEncoder(layer, config.layers, enable_nested_tensor=True).eval()
    with torch.no_grad():
        for to, source in zip(stack.layers, encoder.layers, strict=True):
            parts = (source.query, source.key, source.value)
            to.self_attn.in_proj_weight.copy_(torch.cat([part.weight for part in parts]))
            to.self_attn.in_proj_bias.copy_(torch.cat([part.bias for part in parts]))
            pairs = ((to.self_attn.out_proj, source.output), (to.linear1, source.up), (to.linear2, source.down),
                     (to.norm1, source.attention_norm), (to.norm2, source.feed_forward_norm))  # fmt: skip
            for target, given in pairs:
                target.weight.copy_(given.weight)
                target.bias.copy_(given.bias)

    def run(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        places = torch.arange(ids.shape[1])
        x = encoder.norm(encoder.embedding(ids) + encoder.positions(places) + encoder.segments.weight[0])
        return stack(x, src_key_padding_mask=~mask)

    return run


def buckets(encoder: Encoder, count: int = 4) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The padded encoder on groups of similar length, each padded to its own longest."""

    def run(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        out = torch.zeros(*ids.shape, encoder.config.hidden)
        for rows in torch.argsort(mask.sum(1)).chunk(count):
            longest = int(mask[rows].sum(1).max())
            out[rows, :longest] = encoder(ids[rows, :longest], mask[rows, :longest])
        return out

    return run


def onnx_runtime(encoder: Encoder, threads: int) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None:
    """The padded encoder in ONNX Runtime; None without it or without the exporter's onnxscript."""
    try:
        import io

        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError:
        return None
    sizes = {0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("tokens", max=512)}
    example = (torch.ones(2, 8, dtype=torch.int64), torch.ones(2, 8, dtype=torch.bool))
    program = torch.onnx.export(encoder, example, dynamo=True, dynamic_shapes=(sizes, sizes), verbose=False)
    buffer = io.BytesIO()
    program.save(buffer)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(buffer.getvalue(), options, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    return lambda ids, mask: torch.from_numpy(
        session.run(None, dict(zip(names, (ids.numpy(), mask.numpy()), strict=True)))[0]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--longest", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=9)
    given = parser.parse_args()
    encoder = load("minilm").encoder.eval()
    packed = PackedEncoder(encoder)
    rows: list[dict[str, Any]] = []
    for threads in given.threads:
        torch.set_num_threads(threads)
        sides: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
            "packed": packed, "padded": encoder, "buckets": buckets(encoder), "nested tensors": nested(encoder),
        }  # fmt: skip
        if (session := onnx_runtime(encoder, threads)) is not None:
            sides["ONNX Runtime, padded"] = session
        for longest in given.longest:
            for kind in ("skewed", "uniform", "even"):
                count = lengths(kind, given.batch, longest)
                mask = torch.arange(longest) < count[:, None]
                ids = torch.randint(1000, 20000, mask.shape, generator=torch.Generator().manual_seed(0))
                times: dict[str, list[float]] = {name: [] for name in sides}
                with torch.inference_mode():
                    expected = encoder(ids, mask)
                    errors = {
                        name: float((side(ids, mask)[:, :longest] - expected)[mask].abs().max())
                        for name, side in sides.items()
                    }
                    for _ in range(given.repeats):
                        for name, side in sides.items():
                            start = perf_counter()
                            side(ids, mask)
                            times[name].append(perf_counter() - start)
                found = {name: median(each) for name, each in times.items()}
                ratios = {name: each / found["packed"] for name, each in found.items()}
                rows.append({
                    "threads": threads, "longest": longest, "lengths": kind, "share": float(mask.float().mean()),
                    "median_s": found, "times as long as packed": ratios, "largest error": errors,
                })  # fmt: skip
                shown = ", ".join(f"{name} x{ratio:.2f}" for name, ratio in ratios.items())
                print(f"{threads} threads, {longest} {kind:8s} ({rows[-1]['share']:.2f} real): {shown}", flush=True)
    write_json(RESULT, {"evidence": "executed", "network": "MiniLM-L6-v2", "batch": given.batch, "rows": rows})


if __name__ == "__main__":
    main()
