"""Types of the native kernels; shapes and meanings are in native/*.cpp."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

def pack_planes(
    codes: NDArray[np.uint8], bits: int, blocked: bool, threads: int, words: NDArray[np.uint64]
) -> None: ...
def quantise_planes(
    x: NDArray[np.float32],
    bits: int,
    share: float,
    given: bool,
    blocked: bool,
    vectors: bool,
    threads: int,
    scales: NDArray[np.float32],
    sums: NDArray[np.int64],
    words: NDArray[np.uint64],
) -> None: ...
def all_finite(x: NDArray[np.float32]) -> bool: ...
def bit_plane_matmul(
    weights: NDArray[np.uint64],
    w_bits: int,
    w_blocked: bool,
    activations: NDArray[np.uint64],
    a_bits: int,
    a_blocked: bool,
    k: int,
    use_xor: bool,
    path: str,
    threads: int,
    out: NDArray[np.int32],
) -> None: ...
def bit_plane_linear(
    weights: NDArray[np.uint64],
    w_bits: int,
    w_blocked: bool,
    activations: NDArray[np.uint64],
    a_bits: int,
    a_blocked: bool,
    k: int,
    path: str,
    threads: int,
    w_scales: NDArray[np.float32],
    w_offsets: NDArray[np.float32],
    w_sums: NDArray[np.float32],
    bias: NDArray[np.float32],
    a_scales: NDArray[np.float32],
    a_offsets: NDArray[np.float32],
    a_sums: NDArray[np.float32],
    out: NDArray[np.float32],
) -> None: ...
def bit_plane_path() -> str: ...
def decode_attention(
    query: NDArray[np.float32],
    keys: NDArray[Any],
    values: NDArray[Any],
    lengths: NDArray[np.int64],
    table: NDArray[np.int64] | None,
    new_keys: NDArray[Any] | None,
    new_values: NDArray[Any] | None,
    pieces: NDArray[np.int64],
    bounds: NDArray[np.int64],
    kind: str,
    tile: int,
    scale: float,
    path: str,
    threads: int,
    out: NDArray[np.float32],
    lse: NDArray[np.float32],
) -> None: ...
def decode_attention_path() -> str: ...
def digit_histogram(
    values: NDArray[np.int8], digit_counts: NDArray[np.uint8], histogram: NDArray[np.int64]
) -> None: ...
def gla_forward(
    q: NDArray[np.float32],
    k: NDArray[np.float32],
    v: NDArray[np.float32],
    gates: NDArray[np.float32],
    offsets: NDArray[np.int64],
    initial: NDArray[np.float32] | None,
    scale: float,
    chunk: int,
    sub: int,
    recurrent: bool,
    path: str,
    threads: int,
    out: NDArray[np.float32],
    last: NDArray[np.float32],
) -> None: ...
def gla_backward(
    q: NDArray[np.float32],
    k: NDArray[np.float32],
    v: NDArray[np.float32],
    gates: NDArray[np.float32],
    offsets: NDArray[np.int64],
    initial: NDArray[np.float32] | None,
    scale: float,
    d_out: NDArray[np.float32],
    d_last: NDArray[np.float32] | None,
    chunk: int,
    sub: int,
    path: str,
    threads: int,
    d_q: NDArray[np.float32],
    d_k: NDArray[np.float32],
    d_v: NDArray[np.float32],
    d_gates: NDArray[np.float32],
    d_initial: NDArray[np.float32],
) -> None: ...
def gla_path() -> str: ...
def late_dequantisation_path() -> str: ...
def packed_uint4_bytes(k: int, n: int, group: int) -> int: ...
def pack_uint4(codes: NDArray[np.uint8], group: int, packed: NDArray[np.uint8]) -> None: ...
def uint4_matmul_int8(
    packed: NDArray[np.uint8],
    k: int,
    n: int,
    group: int,
    x: NDArray[np.int8],
    token: NDArray[np.float32],
    scale: NDArray[np.float32],
    zero: NDArray[np.uint8],
    path: str,
    threads: int,
    out: NDArray[np.float32],
) -> None: ...
def uint4_matmul_float(
    packed: NDArray[np.uint8],
    k: int,
    n: int,
    group: int,
    x: NDArray[np.float32],
    scale: NDArray[np.float32],
    zero: NDArray[np.uint8],
    late: bool,
    path: str,
    threads: int,
    out: NDArray[np.float32],
) -> None: ...

class LlamaDecoder:
    length: int
    weight_bytes: int
    def __init__(
        self,
        vocabulary: int,
        hidden: int,
        layers: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        feed_forward: int,
        norm_eps: float,
        half_cache: bool,
        cosines: NDArray[np.float32],
        sines: NDArray[np.float32],
    ) -> None: ...
    def set_norm(self, name: str, layer: int, weight: NDArray[np.float32]) -> None: ...
    def set_matrix(
        self,
        name: str,
        layer: int,
        codes: NDArray[np.uint8],
        scales: NDArray[np.uint16],
        minimums: NDArray[np.uint16] | None,
        bits: int,
    ) -> None: ...
    def forward(self, ids: NDArray[np.int64], path: str, threads: int, logits: NDArray[np.float32]) -> None: ...
    def truncate(self, length: int) -> None: ...

def low_bit_rows_path() -> str: ...
def logarithmic_matmul(
    a: NDArray[np.float32],
    b: NDArray[np.float32],
    offset: int,
    every: int,
    mantissa_bits: int,
    lowest_exponent: int,
    largest: float,
    least_normal: float,
    greatest: float,
    saturates: bool,
    threads: int,
    out: NDArray[np.float32],
) -> None: ...
def group_magnitudes(x: NDArray[np.float32], maxima: NDArray[np.float32]) -> None: ...
def encode_integers(x: NDArray[np.float32], scale: NDArray[np.float32], top: int, codes: NDArray[np.uint8]) -> None: ...
def encode_floats(
    x: NDArray[np.float32],
    scale: NDArray[np.float32],
    mantissa: int,
    bias: int,
    largest: float,
    sign_bit: int,
    codes: NDArray[np.uint8],
) -> None: ...
def group_extremes(x: NDArray[np.float32], low: NDArray[np.float32], high: NDArray[np.float32]) -> None: ...
def encode_unsigned(
    x: NDArray[np.float32],
    scale: NDArray[np.float32],
    zero: NDArray[np.float32],
    top: int,
    codes: NDArray[np.uint8],
) -> None: ...
def encode_bipolar(x: NDArray[np.float32], scale: NDArray[np.float32], top: int, codes: NDArray[np.uint8]) -> None: ...
def bipolar_scales(
    x: NDArray[np.float32],
    most: NDArray[np.float32],
    shares: NDArray[np.float32],
    top: int,
    scale: NDArray[np.float32],
) -> None: ...
def encode_powers(
    x: NDArray[np.float32], scale: NDArray[np.float32], lowest: int, sign_bit: int, codes: NDArray[np.uint8]
) -> None: ...
def decode_unsigned(
    codes: NDArray[np.uint8], zero: NDArray[np.float32], scale: NDArray[np.float32], x: NDArray[np.float32]
) -> None: ...
def decode_codes(
    codes: NDArray[np.uint8], table: NDArray[np.float32], scale: NDArray[np.float32], x: NDArray[np.float32]
) -> None: ...
def outlier_victim_search(
    x: NDArray[np.float32],
    base: NDArray[np.float64],
    percents: NDArray[np.float64],
    bits: int,
    mantissa: int,
    bias: int,
    top: float,
    last: float,
    flint: bool,
    left: bool,
    exhaustive: bool,
    found: NDArray[np.float32],
    error: NDArray[np.float64],
) -> None: ...
def outlier_victim_reach(x: NDArray[np.float32], deviations: float, found: NDArray[np.float64]) -> None: ...
def outlier_victim_encode(
    x: NDArray[np.float32],
    scale: NDArray[np.float32],
    bits: int,
    mantissa: int,
    bias: int,
    top: float,
    last: float,
    flint: bool,
    left: bool,
    identifier: int,
    codes: NDArray[np.uint8],
) -> None: ...
def outlier_victim_decode(
    codes: NDArray[np.uint8],
    scale: NDArray[np.float32],
    normal: NDArray[np.float32],
    outlier: NDArray[np.float32],
    identifier: int,
    x: NDArray[np.float32],
) -> int: ...
def simulate_gates(
    tables: NDArray[np.uint64],
    gate_inputs: NDArray[np.int32],
    gate_outputs: NDArray[np.int32],
    flop_data: NDArray[np.int32],
    flop_outputs: NDArray[np.int32],
    stimulus_nets: NDArray[np.int32],
    stimulus: NDArray[np.uint64],
    observed_nets: NDArray[np.int32],
    observed: NDArray[np.uint64],
    lanes: NDArray[np.uint64],
    toggles: NDArray[np.int64],
) -> None: ...
def simulate_timeline(
    durations: NDArray[np.float64],
    priorities: NDArray[np.int64],
    after_offsets: NDArray[np.int64],
    after: NDArray[np.int32],
    takes_offsets: NDArray[np.int64],
    takes: NDArray[np.int32],
    take_amounts: NDArray[np.float64],
    gives_offsets: NDArray[np.int64],
    gives: NDArray[np.int32],
    give_amounts: NDArray[np.float64],
    capacities: NDArray[np.float64],
    start: NDArray[np.float64],
    finish: NDArray[np.float64],
    cause: NDArray[np.int32],
) -> int: ...
def block_floating_attention(
    query: NDArray[np.float32],
    key_codes: NDArray[np.uint8],
    key_exponents: NDArray[np.uint8],
    value_codes: NDArray[np.uint8],
    value_exponents: NDArray[np.uint8],
    tokens: int,
    bits: int,
    scale: float,
    vectors: bool,
    threads: int,
    out: NDArray[np.float32],
) -> None: ...
def shift_and_add_path() -> str: ...
def shift_places(
    exponents: NDArray[np.int8], signs: NDArray[np.int8], first: int, count: int, places: NDArray[np.uint16]
) -> None: ...
def shift_matmul32(
    x: NDArray[np.int32],
    places: NDArray[np.uint16],
    first: int,
    count: int,
    wide: bool,
    path: str,
    threads: int,
    out: NDArray[np.int32],
) -> None: ...
def shift_matmul64(
    x: NDArray[np.int32],
    places: NDArray[np.uint16],
    first: int,
    count: int,
    wide: bool,
    path: str,
    threads: int,
    out: NDArray[np.int64],
) -> None: ...
def shift_matmul_loop(
    x: NDArray[np.int32], exponents: NDArray[np.int8], signs: NDArray[np.int8], threads: int, out: NDArray[np.int32]
) -> None: ...
def largest_magnitude(x: NDArray[np.int32]) -> int: ...
def fixed_point(x: NDArray[np.float32], fraction_bits: int, out: NDArray[np.int32]) -> bool: ...
def shift_linear(
    x: NDArray[np.int32],
    places: NDArray[np.uint16],
    first: int,
    count: int,
    wide: bool,
    bias: NDArray[np.float32],
    unit: float,
    path: str,
    threads: int,
    out: NDArray[np.float32],
) -> None: ...
def masked_sums_int32(
    masks: NDArray[np.uint64], v: NDArray[np.int32], path: str, threads: int, out: NDArray[np.int64]
) -> None: ...
def masked_sums_int64(
    masks: NDArray[np.uint64], v: NDArray[np.int64], path: str, threads: int, out: NDArray[np.int64]
) -> None: ...
def masked_sums_float32(
    masks: NDArray[np.uint64], v: NDArray[np.float32], path: str, threads: int, out: NDArray[np.float32]
) -> None: ...
def masked_sums_loop(
    mask: NDArray[np.uint8], v: NDArray[np.float32], threads: int, out: NDArray[np.float32]
) -> None: ...
def run_rounds(kind: str, rounds: int) -> int: ...
def group_ranges(
    x: NDArray[np.float32], groups: int, inner: int, threads: int, low: NDArray[np.float32], high: NDArray[np.float32]
) -> None: ...
def quantise_groups(
    x: NDArray[np.float32],
    groups: int,
    inner: int,
    bits: int,
    low: NDArray[np.float32],
    range: NDArray[np.float32],
    stochastic: bool,
    seed: int,
    threads: int,
    codes: NDArray[np.uint8],
) -> None: ...
def dequantise_groups(
    codes: NDArray[np.uint8],
    groups: int,
    inner: int,
    bits: int,
    low: NDArray[np.float32],
    range: NDArray[np.float32],
    threads: int,
    x: NDArray[np.float32],
) -> None: ...
def bias_gelu(x: NDArray[np.float32], bias: NDArray[np.float32], tanh_form: bool, threads: int) -> None: ...
def residual_norm(
    x: NDArray[np.float32],
    bias: NDArray[np.float32],
    residual: NDArray[np.float32],
    gain: NDArray[np.float32],
    shift: NDArray[np.float32],
    epsilon: float,
    place: NDArray[np.int64],
    threads: int,
    out: NDArray[np.float32],
) -> None: ...
def block_sparse_path() -> str: ...
def block_sparse_pack(
    w: NDArray[np.int8], start: NDArray[np.int64], index: NDArray[np.uint16], value: NDArray[np.int8]
) -> None: ...
def block_sparse_matmul(
    start: NDArray[np.int64],
    index: NDArray[np.uint16],
    value: NDArray[np.int8],
    m: int,
    columns: int,
    a: NDArray[np.uint8],
    first: NDArray[np.int32],
    scale: NDArray[np.float32],
    bias: NDArray[np.float32],
    add: NDArray[np.float32],
    gelu: bool,
    inverse: float,
    zero: float,
    statistics: NDArray[np.float32],
    path: str,
    threads: int,
    out: NDArray[Any],
) -> None: ...
def normalise_columns(
    x: NDArray[np.float32],
    statistics: NDArray[np.float32],
    gain: NDArray[np.float32],
    offset: NDArray[np.float32],
    epsilon: float,
    inverse: float,
    zero: float,
    is_signed: bool,
    codes: NDArray[np.uint8],
    threads: int,
) -> None: ...
def transposed_attention(
    q: NDArray[np.uint8],
    q_zero: int,
    k: NDArray[np.int8],
    v: NDArray[np.int8],
    sequences: NDArray[np.int64],
    heads: int,
    score_scale: float,
    inverse: float,
    zero: float,
    path: str,
    threads: int,
    out: NDArray[np.uint8],
) -> None: ...
def transposed_attention_float(
    q: NDArray[np.float32],
    k: NDArray[np.float32],
    v: NDArray[np.float32],
    sequences: NDArray[np.int64],
    heads: int,
    scale: float,
    threads: int,
    out: NDArray[np.float32],
) -> None: ...
def sparse_path() -> str: ...
def tiled_words_pack(
    w: NDArray[np.uint16],
    reorder: bool,
    most: int,
    threads: int,
    offsets: NDArray[np.uint32],
    full: NDArray[np.uint8],
    words: NDArray[np.uint32],
) -> None: ...
def tiled_words_matmul(
    offsets: NDArray[np.uint32],
    words: NDArray[np.uint32],
    slot: NDArray[np.int32],
    dense: NDArray[np.uint16],
    b: NDArray[np.float32],
    path: str,
    threads: int,
    out: NDArray[np.float32],
) -> None: ...
def tiled_words_conflicts(offsets: NDArray[np.uint32], words: NDArray[np.uint32]) -> tuple[int, int]: ...
def bitmap_pack(
    w: NDArray[np.uint16], masks: NDArray[np.uint16], start: NDArray[np.int64], values: NDArray[np.uint16]
) -> None: ...
def bitmap_matmul(
    masks: NDArray[np.uint16],
    start: NDArray[np.int64],
    values: NDArray[np.uint16],
    b: NDArray[np.float32],
    path: str,
    threads: int,
    out: NDArray[np.float32],
) -> None: ...
def blocked_rows_matmul(
    start: NDArray[np.int64],
    index: NDArray[np.uint16],
    values: NDArray[np.uint16],
    b: NDArray[np.float32],
    path: str,
    threads: int,
    out: NDArray[np.float32],
) -> None: ...
def attention_path() -> str: ...
def attention_block() -> tuple[int, int, int]: ...
def attention_forward(
    q: NDArray[np.float32],
    k: NDArray[np.float32],
    v: NDArray[np.float32],
    q_offsets: NDArray[np.int64],
    k_offsets: NDArray[np.int64],
    scale: float,
    cap: float,
    left: int,
    right: int,
    path: str,
    threads: int,
    out: NDArray[np.float32],
    lse: NDArray[np.float32],
) -> None: ...
def attention_backward(
    q: NDArray[np.float32],
    k: NDArray[np.float32],
    v: NDArray[np.float32],
    out: NDArray[np.float32],
    dout: NDArray[np.float32],
    lse: NDArray[np.float32],
    q_offsets: NDArray[np.int64],
    k_offsets: NDArray[np.int64],
    scale: float,
    cap: float,
    left: int,
    right: int,
    path: str,
    threads: int,
    dq: NDArray[np.float32],
    dk: NDArray[np.float32],
    dv: NDArray[np.float32],
) -> None: ...
