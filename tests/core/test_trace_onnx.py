from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from onnx_graphs import Builder, resnet18
from torch import nn

from bitwright.core.errors import InputError
from bitwright.core.trace_onnx import trace_onnx
from bitwright.core.trace_torch import trace_torch
from bitwright.core.workload import Kind, Role, Workload


@pytest.fixture
def resnet(tmp_path: Path) -> Path:
    return resnet18(tmp_path / "resnet18.onnx")


def test_resnet18_has_its_published_work_and_weights(resnet: Path) -> None:
    workload = trace_onnx(resnet, {"batch": 1})
    assert workload.macs == 1_814_073_344
    assert workload.parameters == 11_689_512 - 2 * 4800  # published, less the folded batch norms' weights and biases
    assert not workload.notes
    assert trace_onnx(resnet, {"batch": 4}).macs == 4 * workload.macs


def test_first_convolution_moves_exactly_its_tensors(resnet: Path) -> None:
    stem = next(each for each in trace_onnx(resnet, {"batch": 2}) if each.name == "stem")
    assert stem.bytes_read == 4 * (2 * 3 * 224 * 224 + 64 * 3 * 7 * 7)
    assert stem.bytes_written == 4 * 2 * 64 * 112 * 112


def test_every_operator_follows_from_the_image(resnet: Path) -> None:
    workload = trace_onnx(resnet, {"batch": 1})
    fed = {consumer for _, consumer in workload.edges()}
    assert fed == set(range(1, len(workload)))  # the flatten before the classifier breaks no edge


def test_grouped_dilated_transposed_agree_with_torch(tmp_path: Path) -> None:
    build = Builder()
    build.node("Conv", ["x", build.weight("a", 8, 2, 3, 3), build.weight("ab", 8)], "c1", group=2, strides=[2, 2],
               pads=[1, 1, 1, 1])  # fmt: skip
    build.node("Conv", ["c1", build.weight("d", 8, 1, 5, 5)], "c2", group=8, dilations=[2, 2], pads=[4, 4, 4, 4])
    build.node("ConvTranspose", ["c2", build.weight("t", 8, 3, 4, 4)], "c3", group=2, strides=[2, 2],
               pads=[1, 1, 1, 1])  # fmt: skip
    path = build.save(tmp_path / "m.onnx", {"x": [3, 4, 17, 19]}, "c3")
    network = nn.Sequential(
        nn.Conv2d(4, 8, 3, 2, 1, groups=2),
        nn.Conv2d(8, 8, 5, groups=8, dilation=2, padding=4, bias=False),
        nn.ConvTranspose2d(8, 6, 4, 2, 1, groups=2, bias=False),
    )
    from_onnx, from_torch = trace_onnx(path), trace_torch(network, (torch.zeros(3, 4, 17, 19),))

    def costs(workload: Workload) -> list[tuple[int, float, float]]:
        return [(each.macs, each.bytes_read, each.bytes_written) for each in workload]

    assert costs(from_onnx) == costs(from_torch)
    assert [each.gemms() for each in from_onnx] == [each.gemms() for each in from_torch]
    assert all(sum(gemm.macs for gemm in each.gemms()) == each.macs for each in from_onnx)


def test_attention_written_out_with_shape_arithmetic(tmp_path: Path) -> None:
    build = Builder()
    build.node("MatMul", ["x", build.weight("w", 32, 32)], "q")
    build.node("Shape", ["x"], "shape")
    build.node("Gather", ["shape", build.constant("zero", [0])], "rows")
    build.node("Concat", ["rows", build.constant("rest", [-1, 4, 8])], "split", axis=0)
    build.node("Reshape", ["q", "split"], "heads")
    build.node("Transpose", ["heads"], "left", perm=[0, 2, 1, 3])
    build.node("Transpose", ["heads"], "right", perm=[0, 2, 3, 1])
    build.node("MatMul", ["left", "right"], "scores")
    build.node("Softmax", ["scores"], "p", axis=-1)
    build.node("MatMul", ["p", "left"], "out")
    workload = trace_onnx(build.save(tmp_path / "m.onnx", {"x": ["n", 5, 32]}, "out"), {"n": 3})
    assert [each.kind for each in workload] == [
        Kind.MATMUL, Kind.COPY, Kind.COPY, Kind.MATMUL, Kind.SOFTMAX, Kind.MATMUL,
    ]  # fmt: skip
    assert workload.macs == 3 * 5 * 32 * 32 + 2 * 3 * 4 * 5 * 5 * 8
    assert (0, 1) in workload.edges()
    assert (0, 2) in workload.edges()
    assert set(workload.tensors(Role.WEIGHT)) == {"w"}


def test_unknown_operation_is_kept_with_its_bytes(tmp_path: Path) -> None:
    build = Builder()
    build.node("Mystery", ["x"], "y", domain="mine")
    build.node("Relu", ["y"], "z")
    workload = trace_onnx(build.save(tmp_path / "m.onnx", {"x": [2, 8]}, "z"))
    assert [each.target for each in workload.unknown] == ["Mystery", "Relu"]  # Relu's shape follows from Mystery's
    assert workload.operators[0].bytes_read == 64
    assert "Mystery" in " ".join(workload.notes)
    assert workload.edges() == [(0, 1)]


def test_missing_external_weights_are_not_needed(resnet: Path, tmp_path: Path) -> None:
    model = onnx.load(str(resnet))
    onnx.save_model(model, str(tmp_path / "external.onnx"), save_as_external_data=True, location="weights.bin")
    (tmp_path / "weights.bin").unlink()
    assert trace_onnx(tmp_path / "external.onnx", {"batch": 1}).macs == 1_814_073_344


@pytest.mark.parametrize(
    ("dimensions", "message"),
    [(None, "batch"), ({"batch": 0}, "at least 1"), ({"batch": 1, "length": 3}, "no symbolic dimension length")],
)
def test_bad_dimensions(resnet: Path, dimensions: dict[str, int] | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        trace_onnx(resnet, dimensions)


def test_bad_files(tmp_path: Path, resnet: Path) -> None:
    with pytest.raises(InputError, match="Cannot read"):
        trace_onnx(tmp_path / "none.onnx")
    (tmp_path / "noise.onnx").write_bytes(b"\xff\x00not a model" * 9)
    with pytest.raises(InputError, match="not a usable ONNX file"):
        trace_onnx(tmp_path / "noise.onnx")
    (tmp_path / "cut.onnx").write_bytes(resnet.read_bytes()[:100_000])
    with pytest.raises(InputError):
        trace_onnx(tmp_path / "cut.onnx", {"batch": 1})
    build = Builder()
    build.node("Relu", ["x"], "y")
    with pytest.raises(InputError, match="extent 0"):
        trace_onnx(build.save(tmp_path / "zero.onnx", {"x": [0, 8]}, "y"))
