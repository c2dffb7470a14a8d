"""GGUF: dequantisation against a scalar reading of the block formats, the header against gguf's own reader, damage."""

import struct
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from hypothesis import given, settings
from hypothesis import strategies as st

from bitwright.core.errors import InputError
from bitwright.models.decoder import Decoder, DecoderConfig
from bitwright.models.gguf import decoder_from_gguf, gguf_names, read_gguf, tokenizer_from_gguf

CONFIG = DecoderConfig(
    vocabulary=64,
    hidden=64,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=16,
    feed_forward=96,
    max_positions=128,
    norm_eps=2**-17,
)


def half(data: bytes, at: int) -> float:
    return float(struct.unpack_from("<e", data, at)[0])


def signed(byte: int) -> int:
    return byte - 256 if byte > 127 else byte


def nibbles(data: bytes) -> list[int]:
    return [byte & 15 for byte in data] + [byte >> 4 for byte in data]


def block_values(kind: Type, data: bytes) -> list[float]:
    """The values of one block, written from the C structs of ggml (ggml-common.h) with plain scalars."""
    if kind == Type.F32:
        return [struct.unpack("<f", data)[0]]
    if kind == Type.F16:
        return [half(data, 0)]
    if kind == Type.BF16:
        return [struct.unpack("<f", b"\0\0" + data)[0]]
    if kind == Type.Q8_0:
        return [half(data, 0) * signed(byte) for byte in data[2:]]
    if kind == Type.Q4_0:
        return [half(data, 0) * (code - 8) for code in nibbles(data[2:])]
    if kind == Type.Q4_1:
        return [half(data, 0) * code + half(data, 2) for code in nibbles(data[4:])]
    if kind in (Type.Q5_0, Type.Q5_1):
        start = 2 if kind == Type.Q5_0 else 4
        fifth = struct.unpack_from("<I", data, start)[0]
        codes = [low | (fifth >> i & 1) << 4 for i, low in enumerate(nibbles(data[start + 4 :]))]
        if kind == Type.Q5_0:
            return [half(data, 0) * (code - 16) for code in codes]
        return [half(data, 0) * code + half(data, 2) for code in codes]
    if kind == Type.Q4_K:
        scale, lowest, packed, codes = half(data, 0), half(data, 2), data[4:16], data[16:]
        values = []
        for part in range(8):  # 8 parts of 32 values; 6-bit scales and minima in 12 bytes
            if part < 4:
                s, m = packed[part] & 63, packed[part + 4] & 63
            else:
                s = packed[part + 4] & 15 | (packed[part - 4] >> 6) << 4
                m = packed[part + 4] >> 4 | (packed[part] >> 6) << 4
            group = codes[part // 2 * 32 : part // 2 * 32 + 32]
            values += [scale * s * (byte >> 4 if part % 2 else byte & 15) - lowest * m for byte in group]
        return values
    assert kind == Type.Q6_K
    low, high, scales, scale = data[:128], data[128:192], data[192:208], half(data, 208)
    values = [0.0] * 256
    for i in range(256):
        big, rest = divmod(i, 128)
        quarter, lane = divmod(rest, 32)
        byte = low[big * 64 + quarter % 2 * 32 + lane]
        code = (byte >> 4 if quarter > 1 else byte & 15) | (high[big * 32 + lane] >> 2 * quarter & 3) << 4
        values[i] = scale * signed(scales[i // 16]) * (code - 32)
    return values


def random_blocks(kind: Type, rows: int, blocks: int) -> np.ndarray:
    size, stored = gguf.GGML_QUANT_SIZES[kind]
    generator = np.random.default_rng(int(kind))
    raw = generator.integers(0, 256, (rows, blocks, stored), dtype=np.uint8)
    scales = {Type.F16: [0], Type.Q4_0: [0], Type.Q5_0: [0], Type.Q8_0: [0], Type.Q6_K: [208]}
    for at in scales.get(kind, [0, 2] if size > 1 else []):  # any bits may stand elsewhere; scales must be finite
        scale = generator.uniform(-2, 2, (rows, blocks, 1)).astype("<f2")
        raw[..., at : at + 2] = scale.view(np.uint8)
    if kind in (Type.F32, Type.BF16):
        values = generator.normal(size=(rows, blocks, 1)).astype("<f4").view(np.uint8)
        raw = np.ascontiguousarray(values[..., 4 - stored :])
    return raw.reshape(rows, blocks * stored)


@pytest.mark.parametrize("name", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q6_K"])
def test_every_format_is_read_as_its_block_layout_says(tmp_path: Path, name: str) -> None:
    kind = Type[name]
    stored = gguf.GGML_QUANT_SIZES[kind][1]
    raw = random_blocks(kind, rows=3, blocks=5)
    path = tmp_path / "one.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("t", raw if kind != Type.F32 else raw.view("<f4"), raw_dtype=kind)
    finish(writer)
    data = raw.tobytes()
    expected = [value for at in range(0, len(data), stored) for value in block_values(kind, data[at : at + stored])]
    np.testing.assert_allclose(read_gguf(path).read("t").ravel(), expected, rtol=1e-5, atol=1e-6)


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_tiny(path: Path, model: Decoder, config: DecoderConfig = CONFIG, **overrides: int) -> None:
    """A GGUF file of `model` written by the gguf package, with the query/key order of llama.cpp's converter."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.hidden)
    writer.add_block_count(overrides.get("layers", config.layers))
    writer.add_feed_forward_length(config.feed_forward)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_key_length(config.head_dim)
    weights = dict(model.named_parameters())
    for ours, theirs in gguf_names(config).items():
        weight = weights[ours].numpy()
        if "attn_q" in theirs or "attn_k" in theirs:
            heads = config.heads if "attn_q" in theirs else config.kv_heads
            shape = (heads, 2, config.head_dim // 2, config.hidden)
            weight = weight.reshape(shape).swapaxes(1, 2).reshape(weight.shape)
        writer.add_tensor(theirs, np.ascontiguousarray(weight))
    if config.rope_factors:
        writer.add_tensor("rope_freqs.weight", np.array(config.rope_factors, np.float32))
    finish(writer)


@pytest.fixture(scope="module")
def model() -> Decoder:
    torch.manual_seed(1)
    return Decoder(CONFIG).eval().requires_grad_(False)


@pytest.mark.parametrize("change", [{}, {"tied_embeddings": False}, {"rope_factors": (1.0,) * 4 + (8.0,) * 4}])
def test_a_written_decoder_comes_back_exactly(tmp_path: Path, change) -> None:
    config = replace(CONFIG, **change)
    model = Decoder(config).eval().requires_grad_(False)
    write_tiny(tmp_path / "tiny.gguf", model, config)
    back = decoder_from_gguf(read_gguf(tmp_path / "tiny.gguf"))
    assert back.config == config
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, dict(back.named_parameters())[name]), name
    assert (back.lm_head.weight is back.embedding.weight) == config.tied_embeddings


def test_header_agrees_with_the_gguf_package(smollm2) -> None:
    path = smollm2.files[0]
    ours = read_gguf(path)
    theirs = gguf.GGUFReader(path)
    assert [each.name for each in theirs.tensors] == list(ours.tensors)
    for tensor in theirs.tensors:
        mine = ours.tensors[tensor.name]
        assert mine.type == tensor.tensor_type
        assert mine.shape == tuple(int(extent) for extent in reversed(tensor.shape))
        assert (mine.offset, mine.size) == (int(tensor.data_offset), int(tensor.n_bytes))
    fields = {name: field.contents() for name, field in theirs.fields.items() if not name.startswith("GGUF.")}
    assert fields == ours.metadata


def test_every_truncation_is_a_clear_error(tmp_path: Path, model: Decoder) -> None:
    write_tiny(tmp_path / "tiny.gguf", model)
    data = (tmp_path / "tiny.gguf").read_bytes()
    broken = tmp_path / "cut.gguf"
    for size in [*range(0, 3000, 13), len(data) // 2, len(data) - 40]:
        broken.write_bytes(data[:size])
        with pytest.raises(InputError, match=r"cut\.gguf"):
            decoder_from_gguf(read_gguf(broken))


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2500), st.binary(min_size=1, max_size=8))
def test_damage_never_ends_in_another_exception(tmp_path_factory, at: int, bytes_: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.gguf"
    source = tmp_path_factory.getbasetemp() / "intact.gguf"
    if not source.exists():
        torch.manual_seed(1)
        write_tiny(source, Decoder(CONFIG).requires_grad_(False))
    data = bytearray(source.read_bytes())
    data[at : at + len(bytes_)] = bytes_
    path.write_bytes(data)
    message = ""
    try:
        decoder_from_gguf(read_gguf(path))
    except InputError as error:
        message = str(error)
    assert not message or "damaged.gguf" in message


def header(tensors: int, fields: int, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, fields) + rest


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def entry(name: bytes, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK\3\4" + bytes(40), "letters GGUF"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "version"),
        (header(2**63, 0), "truncated"),
        (header(0, 2**63), "truncated"),
        (header(0, 1, struct.pack("<Q", 2**62)), "truncated"),
        (header(0, 1, text(b"k") + struct.pack("<IIQ", 9, 4, 2**62)), "truncated"),
        (header(0, 1, text(b"k") + struct.pack("<IIQ", 9, 8, 2**62)), "more than the file can hold"),
        (header(0, 1, text(b"k") + struct.pack("<IIQ", 9, 9, 1)), "not supported"),
        (header(0, 1, text(b"k") + struct.pack("<I", 77)), "unknown value type"),
        (header(0, 1, text(b"\xff\xfe") + struct.pack("<IB", 0, 1)), "UTF-8"),
        (header(1, 0, entry(b"t", (2**40, 2**40), 0, 0)), "past the end"),
        (header(1, 0, entry(b"t", (4,), 0, 2**63)), "past the end"),
        (header(1, 0, entry(b"t", (4,), 999, 0)), "unknown type number"),
        (header(1, 0, entry(b"t", (33,), 8, 0)), "blocks of 32"),
        (header(1, 0, entry(b"t", (0,), 0, 0)), "blocks of 1"),
        (header(1, 0, entry(b"t", (1,) * 5, 0, 0)), "dimensions"),
        (header(2, 0, entry(b"t", (4,), 0, 0) + entry(b"t", (4,), 0, 32) + bytes(99)), "twice"),
        (header(2, 0, entry(b"t", (4,), 0, 0) + entry(b"u", (4,), 0, 0) + bytes(99)), "overlaps"),
    ],
)
def test_hostile_headers_are_refused_before_allocation(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "bad.gguf").write_bytes(content)
    with pytest.raises(InputError, match=message) as raised:
        read_gguf(tmp_path / "bad.gguf")
    assert "bad.gguf" in str(raised.value)


def test_an_impossible_number_of_layers_builds_no_module(tmp_path: Path, model: Decoder) -> None:
    write_tiny(tmp_path / "deep.gguf", model, layers=2**31)
    with pytest.raises(InputError, match="announces 2147483648 layers"):
        decoder_from_gguf(read_gguf(tmp_path / "deep.gguf"))


def test_an_unsupported_format_is_named(tmp_path: Path) -> None:
    path = tmp_path / "q2.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    stored = gguf.GGML_QUANT_SIZES[Type.Q2_K][1]
    writer.add_tensor("t", np.zeros((2, stored), np.uint8), raw_dtype=Type.Q2_K)
    finish(writer)
    with pytest.raises(InputError, match=r"q2\.gguf.*Q2_K; supported are F32"):
        read_gguf(path).read("t")


TEXTS = [
    "Hello world",
    "In 1984, 12345 sheep don't we'll I'VE been  double   triple spaces\n\n\nnewlines\t\ttabs \n mixed \r\n",
    "naïve café — “quotes” 日本語のテキスト 한국어 العربية हिन्दी 🙂👩‍👩‍👧 e\u0301",
    "def f(x):\n    return x**2 + 3.14e-10  # comment\n",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    " leading and trailing ",
    "",
    "\x00\x7f�",
]


def test_tokenizer_gives_the_ids_of_transformers(smollm2) -> None:
    from transformers import AutoTokenizer

    path = smollm2.files[0]
    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    ours = tokenizer_from_gguf(read_gguf(path))
    book = (Path(__file__).parents[2] / "src/bitwright/models/texts/kjv-samuel.txt").read_text()
    for sample in [*TEXTS, book]:
        ids = ours.encode(sample).ids
        assert ids == theirs.encode(sample, add_special_tokens=False)
        assert ours.decode(ids, skip_special_tokens=False) == sample


def test_digits_are_split_singly_as_the_file_asks(smollm2) -> None:
    """SmolLM2 cuts digits off first, so spaces before a number stay together; transformers ignores that rule."""
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    path = smollm2.files[0]
    assert read_gguf(path).metadata["tokenizer.ggml.pre"] == "smollm"
    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    for sample in [*TEXTS, "   12  34\n  5½ ٣٤", "x = [1,  2,   3]", Path(__file__).read_text()]:
        assert smollm2.tokenizer.encode(sample).ids == theirs.encode(sample, add_special_tokens=False)


def test_other_tokenizers_are_refused(tmp_path: Path) -> None:
    for fields, message in [
        ({}, "kind None"),
        ({"model": "llama"}, "byte-level BPE"),
        ({"model": "gpt2"}, "lacks the token table"),
        ({"model": "gpt2", "list": ["a", "b", "ab"], "merges": ["a c"]}, "merge table does not fit"),
        ({"model": "gpt2", "list": ["a", "a"], "merges": ["a a"]}, "repeated"),
        ({"model": "gpt2", "list": ["a", "b", "ab"], "merges": ["a b"], "pre": "odd"}, "'odd'"),
    ]:
        writer = gguf.GGUFWriter(tmp_path / "t.gguf", "llama")
        if "model" in fields:
            writer.add_tokenizer_model(fields["model"])
        if "list" in fields:
            writer.add_token_list(fields["list"])
            writer.add_token_merges(fields["merges"])
        if "pre" in fields:
            writer.add_tokenizer_pre(fields["pre"])
        finish(writer)
        with pytest.raises(InputError, match=message):
            tokenizer_from_gguf(read_gguf(tmp_path / "t.gguf"))
