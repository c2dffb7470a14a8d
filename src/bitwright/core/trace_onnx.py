"""An ONNX file as a `Workload`, from its graph alone: weights are neither loaded from other files nor copied."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from bitwright.core.errors import InputError
from bitwright.core.operators import (
    ACTIVATION_FLOPS,
    BATCH_NORM_FLOPS,
    LAYER_NORM_FLOPS,
    RMS_NORM_FLOPS,
    SOFTMAX_FLOPS,
    Operand,
    convolution,
    gather,
    pointwise,
    product,
)
from bitwright.core.workload import Kind, Operator, Role, Workload


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_FORMATS = {
    1: "fp32", 2: "uint8", 3: "int8", 5: "int16", 6: "int32", 7: "int64", 9: "bool", 10: "fp16", 11: "fp64",
    14: "complex64", 15: "complex128", 16: "bf16", 17: "fp8", 18: "fp8", 19: "fp8", 20: "fp8", 21: "uint4", 22: "int4",
}  # fmt: skip
_VIEWS = _names("Reshape Squeeze Unsqueeze Flatten Identity Dropout")
_COPIES = _names(
    "Transpose Concat Split Slice Pad Expand Tile Cast CastLike DepthToSpace SpaceToDepth Where ConstantOfShape "
    "Range Trilu ReverseSequence OneHot EyeLike Compress Upsample"
)
_GATHERS = _names("Gather GatherElements GatherND")
_SCATTERS = _names("Scatter ScatterElements ScatterND")
_REDUCTIONS = _names(
    "ReduceSum ReduceMean ReduceMax ReduceMin ReduceProd ReduceL1 ReduceL2 ReduceSumSquare ReduceLogSum "
    "ReduceLogSumExp ArgMax ArgMin TopK GlobalAveragePool GlobalMaxPool GlobalLpPool"
)
_POOLS = _names("AveragePool MaxPool LpPool")
_NORMS = {
    "BatchNormalization": BATCH_NORM_FLOPS, "LayerNormalization": LAYER_NORM_FLOPS, "LRN": LAYER_NORM_FLOPS,
    "InstanceNormalization": LAYER_NORM_FLOPS, "GroupNormalization": LAYER_NORM_FLOPS, "LpNormalization": 4.0,
    "RMSNormalization": RMS_NORM_FLOPS, "SimplifiedLayerNormalization": RMS_NORM_FLOPS,
    "SkipLayerNormalization": LAYER_NORM_FLOPS + 1, "MeanVarianceNormalization": LAYER_NORM_FLOPS,
}  # fmt: skip
_SOFTMAXES = _names("Softmax LogSoftmax Hardmax")
_SCANS = _names("CumSum")
_ELEMENTWISE = _names(
    "Add Sub Mul Div Neg Abs Exp Log Sqrt Reciprocal Pow Sin Cos Tan Tanh Sinh Cosh Asin Acos Atan Sigmoid Relu "
    "LeakyRelu Gelu FastGelu Elu Selu Celu Mish HardSwish HardSigmoid Softplus Softsign PRelu Clip Max Min Mean "
    "Sum Erf Floor Ceil Round Sign Equal Less LessOrEqual Greater GreaterOrEqual And Or Not Xor Mod IsNaN IsInf "
    "BitShift Swish ThresholdedRelu Resize QuantizeLinear DequantizeLinear DynamicQuantizeLinear QuickGelu "
    "BiasGelu"
)
_SMALL = 512  # elements: larger weights are replaced by their shape before shapes are inferred


def trace_onnx(path: Path | str, dimensions: Mapping[str, int] | None = None, name: str = "") -> Workload:
    """The operators of an ONNX file; `dimensions` gives an extent to every symbolic dimension, {"batch": 4}.

    Constant sub-graphs (shape arithmetic, dequantised weights) are folded. Reshapes cost nothing; a transpose is a
    copy. Attention stays the products and softmax it is written as. An operation not understood, or one whose shapes
    cannot be inferred, becomes an operator of kind UNKNOWN with its bytes, named in the notes.

    Raises InputError for a missing or corrupt file, symbolic dimensions without an extent (it lists them), names in
    `dimensions` the file does not have, and dimensions of zero.
    """
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped, unused-ignore]

    path = Path(path)
    try:
        model = onnx.load(str(path), load_external_data=False)
    except OSError as error:
        raise InputError(f"Cannot read the ONNX file {path}: {error.strerror or error}.") from error
    except (DecodeError, ValueError) as error:
        raise InputError(f"{path} is not a usable ONNX file: {error}.") from None
    if not model.graph.node:
        raise InputError(f"{path} is not a usable ONNX file: its graph has no operators.")
    stored = {each.name: (tuple(each.dims), each.data_type) for each in model.graph.initializer}
    _fix_dimensions(model, path, dict(dimensions or {}), stored)
    _drop_weights(model)
    try:
        inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    except Exception as error:  # the checker's own error types are not exported consistently
        raise InputError(f"The shapes of {path} cannot be inferred: {str(error).splitlines()[0]}.") from error
    return _Graph(inferred, stored, name or path.stem, path).workload()


def _fix_dimensions(model: Any, path: Path, given: dict[str, int], stored: Mapping[str, Any]) -> None:
    """Put the given extents into the inputs and forget every other shape, which may name the symbols."""
    for symbol, extent in given.items():
        if isinstance(extent, bool) or not isinstance(extent, int) or extent < 1:
            raise InputError(f"Dimension {symbol!r} is {extent!r}; expected a whole number of at least 1.")
    missing: list[str] = []
    known: set[str] = set()
    for value in model.graph.input:
        if value.name in stored:
            continue
        if not value.type.HasField("tensor_type") or not value.type.tensor_type.HasField("shape"):
            raise InputError(f"{path}: input {value.name!r} has no shape; expected a tensor of known rank.")
        for index, each in enumerate(value.type.tensor_type.shape.dim):
            if each.HasField("dim_value"):
                if each.dim_value < 1:
                    raise InputError(f"{path}: input {value.name!r} has extent {each.dim_value} in axis {index}.")
                continue
            symbol = each.dim_param or f"{value.name}:{index}"
            known.add(symbol)
            if symbol in given:
                each.dim_value = given[symbol]
            elif symbol not in missing:
                missing.append(symbol)
    if missing:
        raise InputError(
            f"{path} has symbolic dimensions without an extent: {', '.join(missing)}. Give each one, for example "
            f"{missing[0]}=1."
        )
    if unused := sorted(set(given) - known):
        raise InputError(
            f"{path} has no symbolic dimension {', '.join(unused)}; it has: {', '.join(sorted(known)) or 'none'}."
        )
    del model.graph.value_info[:]
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")


def _drop_weights(model: Any) -> None:
    """Turn large initialisers into inputs of the same shape, so that inference does not copy their data."""
    import onnx

    graph = model.graph
    declared = {value.name for value in graph.input}
    keep = []
    for tensor in graph.initializer:
        if math.prod(tensor.dims) <= _SMALL and tensor.data_location != onnx.TensorProto.EXTERNAL:
            keep.append(tensor)
        elif tensor.name not in declared:
            graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    small = [onnx.TensorProto.FromString(each.SerializeToString()) for each in keep]
    del graph.initializer[:]
    graph.initializer.extend(small)
    model.ir_version = max(model.ir_version, 4)


class _Graph:
    """Walks the nodes; `operands` maps each tensor name to what it is, views to what they look at."""

    def __init__(self, model: Any, stored: Mapping[str, tuple[tuple[int, ...], int]], name: str, path: Path) -> None:
        import onnx

        self.attribute_value = onnx.helper.get_attribute_value
        self.graph, self.name, self.path = model.graph, name, path
        self.constants = set(stored)
        self.operands: dict[str, Operand] = {}
        self.operators: list[Operator] = []
        self.notes: dict[str, int] = {}
        for tensor, (shape, kind) in stored.items():
            self.operands[tensor] = Operand(tensor, shape, self.format(kind, tensor), Role.WEIGHT)
        for value in (*model.graph.input, *model.graph.value_info, *model.graph.output):
            if value.name in self.operands:
                continue
            kind = value.type.tensor_type
            if kind.HasField("shape") and all(each.HasField("dim_value") for each in kind.shape.dim):
                role = Role.INDEX if kind.elem_type in (6, 7) else Role.ACTIVATION
                shape = tuple(each.dim_value for each in kind.shape.dim)
                self.operands[value.name] = Operand(value.name, shape, self.format(kind.elem_type, value.name), role)

    def format(self, kind: int, tensor: str) -> str:
        if kind not in _FORMATS:
            if kind == 8:  # strings have no bytes that matter
                return "uint8"
            raise InputError(f"{self.path}: tensor {tensor!r} has ONNX element type {kind}, which has no format here.")
        return _FORMATS[kind]

    def workload(self) -> Workload:
        used: set[str] = set()
        for index, node in enumerate(self.graph.node):
            label = node.name or f"{node.op_type}_{index}"
            while label in used:
                label += "'"
            used.add(label)
            self.visit(node, label)
        notes = [f"{text} ({count} times) is counted by its bytes only." for text, count in sorted(self.notes.items())]
        return Workload(self.name, tuple(self.operators), tuple(notes))

    def visit(self, node: Any, label: str) -> None:
        names = [each for each in node.input if each]
        if node.op_type in ("Constant", "Shape", "Size") or (names and all(each in self.constants for each in names)):
            self.constants.update(node.output)
            for each in node.output:
                if each in self.operands:
                    self.operands[each] = replace(self.operands[each], role=Role.WEIGHT)
            return
        inputs = [self.operands[each] for each in names if each in self.operands]
        outputs = [self.operands[each] for each in node.output if each in self.operands]
        for operand in (*inputs, *outputs):
            if 0 in operand.shape and operand.name not in self.constants:
                raise InputError(
                    f"{self.path}: tensor {operand.name!r} of {label} has a dimension of zero {operand.shape}."
                )
        if node.op_type in _VIEWS and inputs and outputs and node.domain in ("", "ai.onnx"):
            source = inputs[0]
            self.operands[node.output[0]] = replace(source, shape=outputs[0].shape)
            return
        inputs = [each for each in inputs if 0 not in each.shape]
        whole = len(inputs) == len(names) and len(outputs) > 0
        self.operators.append(self.operator(node, label, inputs, outputs) if whole else
                              self.unknown(node, label, inputs, outputs, "without known shapes"))  # fmt: skip

    def unknown(self, node: Any, label: str, inputs: list[Operand], outputs: list[Operand], why: str = "") -> Operator:
        text = f"Unknown operation {node.op_type}" if not why else f"Operation {node.op_type} {why}"
        self.notes[text] = self.notes.get(text, 0) + 1
        made = outputs or [Operand(each, (), role=Role.ACTIVATION, stored=0) for each in node.output if each]
        tensors = [replace(each, stored=each.elements) for each in (*inputs, *made)]
        for each in made:  # later operators still depend on this one
            self.operands.setdefault(each.name, each)
        listed = [each.tensor(()) for each in tensors]
        loops = {"i0": max([1, *(each.elements for each in tensors)])}
        split = len(inputs)
        return Operator(
            label, Kind.UNKNOWN, loops, tuple(listed[:split]), tuple(listed[split:]), 0.0, target=node.op_type
        )

    def operator(self, node: Any, label: str, inputs: list[Operand], outputs: list[Operand]) -> Operator:
        kind = node.op_type
        attributes = {each.name: self.attribute_value(each) for each in node.attribute}
        if any(not each.shape and each.stored == 0 for each in inputs):
            return self.unknown(node, label, inputs, outputs, "without known shapes")
        if kind in ("Conv", "ConvTranspose", "ConvInteger", "QLinearConv"):
            return self.convolution(kind, label, attributes, inputs, outputs)
        if kind in ("MatMul", "Gemm", "MatMulInteger", "QLinearMatMul"):
            return self.product(kind, label, attributes, inputs, outputs)
        if kind in _GATHERS:
            return gather(label, inputs[0], inputs[1:2], outputs[0], target=kind)
        shape = outputs[0].shape

        def points(of: Kind, flops: float) -> Operator:
            return pointwise(label, of, inputs, outputs, shape, flops, target=kind)

        if kind in _POOLS:
            return points(Kind.REDUCTION, float(math.prod(attributes["kernel_shape"])))
        if kind in _REDUCTIONS:
            source = inputs[0].shape
            reduced = [i for i in range(len(source)) if len(shape) == len(source) and shape[i] != source[i]]
            return pointwise(label, Kind.REDUCTION, inputs, outputs, source, reduced=reduced, target=kind)
        if kind in _NORMS:
            return points(Kind.NORMALISATION, _NORMS[kind])
        if kind in _SOFTMAXES:
            return points(Kind.SOFTMAX, SOFTMAX_FLOPS)
        if kind in _COPIES:
            return points(Kind.COPY, 0.0)
        if kind in _SCATTERS:
            return points(Kind.GATHER, 0.0)
        if kind in _SCANS:
            return points(Kind.SCAN, 1.0)
        if kind in _ELEMENTWISE:
            return points(Kind.ELEMENTWISE, ACTIVATION_FLOPS.get(kind.lower(), 1.0))
        return self.unknown(node, label, inputs, outputs)

    def convolution(
        self, kind: str, label: str, attributes: Mapping[str, Any], inputs: list[Operand], outputs: list[Operand]
    ) -> Operator:
        data, weight = (inputs[0], inputs[3]) if kind == "QLinearConv" else inputs[:2]
        extra = [each for each in inputs[2:] if each is not weight]
        rank = len(weight.shape) - 2
        if not 1 <= rank <= 3:
            raise InputError(f"{self.path}: {label} is a convolution over {rank} dimensions; expected 1 to 3.")
        return convolution(
            label, data, weight, outputs[0], attributes.get("strides", [1] * rank),
            attributes.get("dilations", [1] * rank), int(attributes.get("group", 1)),
            transposed=kind == "ConvTranspose", extra=extra, target=kind,
        )  # fmt: skip

    def product(
        self, kind: str, label: str, attributes: Mapping[str, Any], inputs: list[Operand], outputs: list[Operand]
    ) -> Operator:
        left, right = (inputs[0], inputs[3]) if kind == "QLinearMatMul" else inputs[:2]
        extra = [each for each in inputs[2:] if each is not right]
        a, b = left.shape, right.shape
        if kind == "Gemm":
            a = a[::-1] if attributes.get("transA") else a
            b = b[::-1] if attributes.get("transB") else b
        m, k = (a[-2] if len(a) > 1 else 1), a[-1]
        n = b[-1] if len(b) > 1 else 1
        batch = math.prod(outputs[0].shape) // (m * n)
        return product(label, left, right, outputs[0], batch, m, n, k, shared_right=math.prod(b[:-2]) == 1, extra=extra,
                       target=kind)  # fmt: skip
