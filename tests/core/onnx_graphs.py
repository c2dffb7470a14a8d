"""ONNX graphs built for tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


class Builder:
    """Collects nodes and weights."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def weight(self, name: str, *shape: int) -> str:
        self.weights.append(numpy_helper.from_array(np.zeros(shape, np.float32), name))
        return name

    def constant(self, name: str, values: list[int]) -> str:
        self.weights.append(numpy_helper.from_array(np.array(values, np.int64), name))
        return name

    def node(self, kind: str, inputs: list[str], output: str, **attributes: object) -> str:
        self.nodes.append(helper.make_node(kind, inputs, [output], name=output, **attributes))
        return output

    def convolution(self, data: str, name: str, shape: tuple[int, ...], stride: int, padding: int) -> str:
        weight = self.weight(f"{name}.w", *shape)
        return self.node("Conv", [data, weight], name, kernel_shape=list(shape[2:]), strides=[stride] * 2,
                         pads=[padding] * 4)  # fmt: skip

    def save(self, path: Path, inputs: dict[str, list[int | str]], output: str) -> Path:
        declared = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()]
        result = helper.make_tensor_value_info(output, TensorProto.FLOAT, None)
        graph = helper.make_graph(self.nodes, "graph", declared, [result], self.weights)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("mine", 1)])
        path.write_bytes(model.SerializeToString())
        return path


def resnet18(path: Path) -> Path:
    """ResNet-18 (He et al., 2016, table 1) with a symbolic batch, batch norms folded."""
    build = Builder()
    state = build.node("Relu", [build.convolution("image", "stem", (64, 3, 7, 7), 2, 3)], "stem.relu")
    state = build.node("MaxPool", [state], "pool", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    width = 64
    for stage, channels in enumerate((64, 128, 256, 512)):
        for block in range(2):
            name, stride = f"s{stage}b{block}", 2 if stage and not block else 1
            skip = state
            if stride == 2:
                skip = build.convolution(state, f"{name}.down", (channels, width, 1, 1), 2, 0)
            inner = build.convolution(state, f"{name}.c1", (channels, width, 3, 3), stride, 1)
            inner = build.node("Relu", [inner], f"{name}.r1")
            inner = build.convolution(inner, f"{name}.c2", (channels, channels, 3, 3), 1, 1)
            state = build.node("Relu", [build.node("Add", [inner, skip], f"{name}.add")], f"{name}.r2")
            width = channels
    state = build.node("Flatten", [build.node("GlobalAveragePool", [state], "gap")], "flat")
    build.node("Gemm", [state, build.weight("fc.w", 1000, 512), build.weight("fc.b", 1000)], "logits", transB=1)
    return build.save(path, {"image": ["batch", 3, 224, 224]}, "logits")
