"""System 40: gated linear attention with two levels of chunks (arXiv 2312.06635)."""

from __future__ import annotations

from functools import partial
from itertools import product
from statistics import mean

import torch
from torch import Tensor
from torch.nn import functional

from bitwright.core.machine import load_machine
from bitwright.core.quantity import Evidence, Quantity
from bitwright.kernels import gated_linear_attention_forms as forms
from bitwright.kernels.gated_linear_attention import gla, state_bytes
from bitwright.kernels.gated_linear_attention_cost import crossover, gpu_work, softmax_work, time_on
from bitwright.reproduce.claims import Claim
from bitwright.reproduce.gla_training import RecallTraining, Training, perplexity_per_byte, recall_accuracy

STATUS = "started"
ENTRY_POINTS = (
    "bitwright.kernels.gated_linear_attention.gla",
    "bitwright.kernels.gated_linear_attention_forms.chunked",
    "bitwright.kernels.gated_linear_attention_cost.gpu_work",
    "bitwright.models.gated_linear_attention.GLATransformer",
)
SEEDS = (0, 1, 2)
_PAPER = "arXiv 2312.06635"
_CHUNKS = ((64, 16), (64, 8), (16, 16), (1, 1), (128, 64))
_GATES = ("usual", "strong", "extreme")


def _operands(gates: str, tokens: int = 150) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys, values, gates and a state, float64; tokens no multiple of a chunk."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q, k, v, state = draw(1, tokens, 2, 24), draw(1, tokens, 2, 24), draw(1, tokens, 2, 40), draw(1, 2, 24, 40)
    uniform = torch.rand(q.shape, generator=generator, dtype=torch.float64)
    log_alpha = {
        "usual": functional.logsigmoid(draw(*q.shape)) / 16,
        "strong": -20 * uniform,
        "extreme": torch.where(uniform < 0.5, 1e-6, 1 - 1e-6).log(),
    }[gates]
    return q, k, v, log_alpha, state


def _error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).abs().max() / expected.abs().max())


def equal_forms(kind: torch.dtype, bound: float) -> tuple[int, int]:
    """Forms and chunk sizes whose outputs and last states lie within `bound` of the float64 recurrence, of all."""
    right = tried = 0
    for gates in _GATES:
        given = _operands(gates)
        expected = forms.recurrent(*given[:4], 24**-0.5, given[4])
        narrow = [each.to(kind) for each in given[:4]]
        state = given[4].to(torch.promote_types(kind, torch.float32))
        settings = [("chunk", sizes) for sizes in _CHUNKS] + [("recurrent", (64, 16))]
        for mode, (chunk, sub) in settings:
            found = gla(*narrow, chunk=chunk, sub=sub, mode=mode, initial_state=state, return_state=True)
            right += max(_error(*pair) for pair in zip(found, expected, strict=True)) < bound
            tried += 1
    return right, tried


def equal_gradients(bound: float = 2e-5) -> tuple[int, int]:
    """Chunk sizes and gates whose gradients (of everything, the states included) lie within `bound` of autograd of the
    float64 recurrence, of all."""
    right = tried = 0
    for gates, (chunk, sub) in product(_GATES, _CHUNKS):
        q, k, v, log_alpha, state = wide = [each.requires_grad_() for each in _operands(gates, 100)]
        outputs = forms.recurrent(q, k, v, log_alpha, 24**-0.5, state)
        slopes = [torch.cos(torch.arange(each.numel(), dtype=torch.float64)).view_as(each) for each in outputs]
        expected = torch.autograd.grad(outputs, wide, slopes)
        mine = [each.detach().float().requires_grad_() for each in wide]
        found = gla(*mine[:4], chunk=chunk, sub=sub, mode="chunk", initial_state=mine[4], return_state=True)
        got = torch.autograd.grad(list(found), mine, [each.float() for each in slopes])
        right += max(_error(*pair) for pair in zip(got, expected, strict=True)) < bound
        tried += 1
    return right, tried


def strong_gates(tokens: int = 4096) -> Quantity:
    """Error of the two-level form in bfloat16 under gates of logit -20, and how the factored form ends."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, tokens, 1, 16, generator=generator).bfloat16() for _ in range(3))
    log_alpha = torch.full(q.shape, -20.0 / 16)
    found = forms.chunked(q, k, v, log_alpha, 0.25)[0]
    exact = forms.recurrent(q.double(), k.double(), v.double(), log_alpha.double(), 0.25)[0]
    factored = gla(q[:, :512].float(), k[:, :512].float(), v[:, :512].float(), log_alpha[:, :512], mode="parallel")
    assert isinstance(factored, Tensor)
    lost = int((~torch.isfinite(factored)).any(-1).sum())
    return Quantity(_error(found, exact), "", Evidence.EXECUTED,
                    f"{tokens} steps; without sub-chunks {lost} of 512 outputs overflow in float32")  # fmt: skip


def combined_parts(parts: int = 4, tokens: int = 256) -> Quantity:
    """Error of a sequence computed in parts whose states are combined, against one pass, and bytes per hop."""
    given = [each.float() for each in _operands("usual", tokens)[:4]]
    whole = gla(*given, mode="chunk")
    assert isinstance(whole, Tensor)
    size = tokens // parts
    pieces = [[each[:, i * size : (i + 1) * size] for each in given] for i in range(parts)]
    states = [gla(*piece, mode="chunk", return_state=True)[1] for piece in pieces]
    starts = forms.combine([piece[3].sum(1).exp() for piece in pieces], states)
    found = [gla(*piece, mode="chunk", initial_state=start) for piece, start in zip(pieces, starts, strict=True)]
    out = torch.cat([each for each in found if isinstance(each, Tensor)], 1)
    text = f"{parts} parts; {state_bytes(2, 24, 40)} bytes of state per hop"
    return Quantity(_error(out, whole.double()), "", Evidence.EXECUTED, text)


def perplexity_ratio(gates: str) -> Quantity:
    """Held-out perplexity per byte with other gates over that with gates per channel, mean of the seeds."""
    other, ours = ([perplexity_per_byte(kind, seed) for seed in SEEDS] for kind in (gates, "channel"))
    worse = sum(a > b for a, b in zip(other, ours, strict=True))
    text = f"{mean(other):.3f} and {mean(ours):.3f} per byte; higher in {worse} of {len(SEEDS)} seeds"
    return Quantity(mean(other) / mean(ours), "x", Evidence.EXECUTED, text)


def recall_ratio() -> Quantity:
    """Recall with gates per channel over recall with a fixed decay."""
    ours, fixed = recall_accuracy("channel"), recall_accuracy("fixed")
    return Quantity(ours / fixed, "x", Evidence.EXECUTED, f"{100 * ours:.1f} % and {100 * fixed:.1f} % of the values")


def _published(value: float, unit: str, where: str) -> Quantity:
    return Quantity(value, unit, Evidence.PUBLISHED, where)


def _share(counted: tuple[int, int]) -> Quantity:
    return Quantity(100 * counted[0] / counted[1], "%", Evidence.EXECUTED, f"{counted[0]} of {counted[1]}")


def _crossover(machine: str, batch: int) -> Quantity:
    device = load_machine(machine).device()
    kept, walked = (crossover(device, batch, 16, 64, materialised) for materialised in (True, False))
    best = min(each for each in (kept, walked) if each is not None)
    return Quantity(best, "tokens", Evidence.PREDICTED, f"states in memory: {kept}; on the chip: {walked}; at peaks")


def _gain(machine: str, tokens: int) -> Quantity:
    device = load_machine(machine).device()
    times = [time_on(device, gpu_work(32, tokens, 16, 64, 64, materialised=kept)).time_s for kept in (True, False)]
    softmax = time_on(device, softmax_work(32, tokens, 16, 64)).time_s
    text = (
        f"batch 32, 16 heads of 64; states in memory x{softmax / times[0]:.2f}, on the chip x{softmax / times[1]:.2f}"
    )
    return Quantity(softmax / min(times), "x", Evidence.PREDICTED, text)


def claims() -> tuple[Claim, ...]:
    """Exactness, stability, small trainings, state sizes and predicted GPUs; CPU speed is in
    `benchmarks/gated_linear_attention.py`."""
    training = Training()
    conditions = (f"{training.layers} layers of {training.hidden}, {training.steps} steps of {training.batch} x "
                  f"{training.window} bytes, 3 seeds")  # fmt: skip
    small = (
        "minutes of training on 140 kB of text, per byte, instead of 7 billion tokens: only the order compares, and "
        "gates per channel and per head do not differ yet"
    )
    found = [
        Claim("forms and chunks within 1e-12 of the recurrence", "float64, gates from 1e-6 to 1 - 1e-6, initial state",
              _published(100, "%", f"{_PAPER}, section 4"), lambda: _share(equal_forms(torch.float64, 1e-12)), 0.0),
        Claim("forms and chunks within 2e-5 of the recurrence", "native kernel, float32",
              _published(100, "%", f"{_PAPER}, section 4"), lambda: _share(equal_forms(torch.float32, 2e-5)), 0.0),
        Claim("forms and chunks within 2e-2 of the recurrence", "bfloat16 operands, computed in float32",
              _published(100, "%", f"{_PAPER}, section 4"), lambda: _share(equal_forms(torch.bfloat16, 2e-2)), 0.0),
        Claim("gradients within 2e-5 of the recurrence's", "float32, gates and states included, closed-form gates",
              _published(100, "%", f"{_PAPER}, appendix C"), lambda: _share(equal_gradients()), 0.0),
        Claim("error under strong gates", "bfloat16, logit -20, two levels of chunks",
              _published(0.0, "", f"{_PAPER}, section 4.3: stable in half precision"), strong_gates, None,
              "rounding of bfloat16 (2^-8); the published claim is that nothing overflows"),
        Claim("error of a sequence in parts", "states combined between 4 parts",
              _published(0.0, "", f"{_PAPER}, section 4.2"), combined_parts, None, "rounding of float32"),
        Claim("values of the state of a layer", "hidden 2,048, 4 heads",
              _published(524_288, "values", f"{_PAPER}, section 4.4"),
              lambda: Quantity(state_bytes(4, 256, 512) / 4, "values", Evidence.EXECUTED), 0.0),
        Claim("tokens whose keys and values are as large as the state", "hidden 2,048, 4 heads",
              _published(128, "tokens", f"{_PAPER}, sizes of section 4.4"),
              lambda: Quantity(state_bytes(4, 256, 512) / (4 * 2 * 2048), "tokens", Evidence.EXECUTED), 0.0),
    ]  # fmt: skip
    for gates, name, published in (
        ("scalar", "a scalar gate per head", 15.56), ("fixed", "a fixed decay per head", 16.55),
        ("none", "no gate", 23.21),
    ):  # fmt: skip
        found.append(
            Claim(f"perplexity with {name} over gates per channel", conditions,
                  _published(published / 14.77, "x", f"{_PAPER}, table 4"), partial(perplexity_ratio, gates), None,
                  small)
        )  # fmt: skip
    recall = RecallTraining()
    found.append(
        Claim("recall over that with a fixed decay",
              f"{recall.pairs} of {recall.symbols} pairs in {recall.tokens} tokens, {recall.layers} layers of "
              f"{recall.hidden}, {recall.steps} steps",
              _published((19.9 + 50.6 + 42.6) / (14.3 + 42.8 + 34.7), "x", f"{_PAPER}, table 3, GLA and RetNet"),
              recall_ratio, None, "a synthetic task and minutes of training instead of 1.3 billion parameters")
    )  # fmt: skip
    for machine in ("h100-sxm", "a100-80g"):
        found.append(
            Claim("tokens from which on it is faster than softmax attention", f"batch 32, 16 heads of 64, {machine}",
                  _published(4096, "tokens", f"{_PAPER} version 1, abstract"), partial(_crossover, machine, 32), None,
                  "the later version says faster even at 1,024 tokens; layers around attention are not in ours")
        )  # fmt: skip
    for tokens in (1024, 4096, 16384):
        found.append(
            Claim("speed over softmax attention", f"{tokens} tokens, H100",
                  _published(1.0, "x", f"{_PAPER}: comparable at 2k, faster beyond 4k (version 1), at 1k (later)"),
                  partial(_gain, "h100-sxm", tokens), None, "attention alone, all units at their peaks")
        )  # fmt: skip
    return tuple(found)
