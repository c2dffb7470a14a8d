"""Work of gated linear attention and of softmax attention on GPUs, and where one overtakes the other. Evidence:
predicted.

Products run on matrix units in fp16; within sub-chunks every pair of tokens and channel takes an exponential and a
multiply-add on vector units, as every pair of tokens does in softmax attention. "materialised" writes the state of
every chunk to memory and then computes all chunks at once; otherwise a head goes from chunk to chunk with its state on
the chip. All units at their peaks: what neither reaches does not count.

Source: arXiv 2312.06635, sections 4.2 and 4.3; arXiv 2307.08691, section 3.1 (causal attention).
"""

from __future__ import annotations

from math import ceil

from bitwright.core.errors import InputError
from bitwright.core.machine import Device
from bitwright.kernels.work import Cost, Work, predict, rates_of

ITEM = 2  # bytes of an operand
GATE_ITEM = 4  # gates stay in fp32
VALUE_BLOCK = 64  # channels of values that one program computes
# Special functions per clock and multiprocessor are 16, against 128 fp32 multiply-adds, which count as two operations
# (NVIDIA, CUDA C++ Programming Guide, table of arithmetic throughput, compute capability 8.0 and 9.0).
EXPONENTIALS_PER_OPERATION = 1 / 16


def gpu_work(
    batch: int, tokens: int, heads: int, keys: int, values: int, chunk: int = 64, sub: int = 16,
    materialised: bool = True,
) -> Work:  # fmt: skip
    """What one forward pass of gated linear attention does on a GPU. Raises InputError for sizes below one and a chunk
    that is not whole sub-chunks."""
    if min(batch, tokens, heads, keys, values, chunk, sub) < 1 or chunk % sub:
        raise InputError(f"Shape {(batch, tokens, heads, keys, values)}, chunks of {chunk} in sub-chunks of {sub}.")
    every, chunks = float(batch * tokens * heads), ceil(tokens / chunk)
    near = min(sub, tokens) / 2  # keys within a query's own sub-chunk, on average
    far = min(chunk, tokens) / 2 - near
    products = every * (4 * keys * values + 2 * far * keys + 2 * (far + near) * values)
    pairs = every * near * keys
    decays = every * 4 * keys  # of queries and keys, to and from the ends of sub-chunks
    operands = every * (2 * keys * ITEM + keys * GATE_ITEM + 2 * values * ITEM)
    blocks = ceil(values / VALUE_BLOCK)
    states = float(batch * heads * chunks * keys * values * ITEM)
    again = every * (keys * ITEM + keys * GATE_ITEM + values * ITEM)  # keys, gates and values a second time
    traffic = operands + again + 2 * states if materialised else operands
    return Work(
        {"matrix fp16": products, "fp32": 2 * pairs, "exponentials": pairs + decays}, {"memory": traffic},
        pieces=batch * heads * (chunks if materialised else blocks), launches=2 if materialised else 1,
    )  # fmt: skip


def softmax_work(batch: int, tokens: int, heads: int, channels: int) -> Work:
    """What one forward pass of causal softmax attention does on a GPU, tiled so that scores stay on the chip."""
    if min(batch, tokens, heads, channels) < 1:
        raise InputError(f"Shape {(batch, tokens, heads, channels)}: all sizes are at least 1.")
    scores = batch * heads * tokens * (tokens + 1) / 2
    return Work(
        {"matrix fp16": 4 * scores * channels, "fp32": 4 * scores, "exponentials": scores},
        {"memory": 4.0 * batch * tokens * heads * channels * ITEM}, pieces=batch * heads * ceil(tokens / 128),
    )  # fmt: skip


def time_on(device: Device, work: Work) -> Cost:
    """Predicted time on a device of a machine file. Raises InputError where it states no fp32 vector rate or cores."""
    fp32 = device.compute.vector.get("fp32")
    if fp32 is None or device.cores is None:
        raise InputError(f"{device.title or 'The device'} states no fp32 vector rate or no number of cores.")
    each = fp32.value / device.cores.value
    return predict(work, rates_of(device, {"exponentials": each * EXPONENTIALS_PER_OPERATION}))


def crossover(device: Device, batch: int, heads: int, channels: int, materialised: bool = True) -> int | None:
    """Tokens, a power of two up to 2^20, from which on gated linear attention is predicted faster; None if never."""
    found = None
    for power in range(7, 21):
        tokens = 1 << power
        linear = time_on(device, gpu_work(batch, tokens, heads, channels, channels, materialised=materialised))
        softmax = time_on(device, softmax_work(batch, tokens, heads, channels))
        found = (found or tokens) if linear.time_s < softmax.time_s else None
    return found
