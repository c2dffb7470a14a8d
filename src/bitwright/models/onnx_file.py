"""ONNX files: a checked handle with the graph's inputs and outputs, for the tracer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitwright.core.errors import InputError


@dataclass(frozen=True)
class OnnxFile:
    """An ONNX model on disk; shapes hold an int per known extent, a name per symbolic one, "?" if unsaid."""

    path: Path
    inputs: dict[str, tuple[int | str, ...]]
    outputs: dict[str, tuple[int | str, ...]]


def read_onnx(path: Path) -> OnnxFile:
    """Read the header of an ONNX file; weights kept in other files are not opened.

    Raises InputError when the file is missing, is not ONNX, or has no graph.
    """
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped, unused-ignore]

    try:
        model = onnx.load(str(path), load_external_data=False)
    except OSError as error:
        raise InputError(f"Cannot read the ONNX file {path}: {error.strerror or error}.") from error
    except DecodeError as error:
        raise InputError(f"{path} is not a usable ONNX file: {error}.") from None
    if not model.graph.node:
        raise InputError(f"{path} is not a usable ONNX file: its graph has no operators.")
    stored = {tensor.name for tensor in model.graph.initializer}
    inputs = {value.name: _shape(value) for value in model.graph.input if value.name not in stored}
    return OnnxFile(path, inputs, {value.name: _shape(value) for value in model.graph.output})


def _shape(value: Any) -> tuple[int | str, ...]:
    extents = value.type.tensor_type.shape.dim
    return tuple(each.dim_value if each.HasField("dim_value") else each.dim_param or "?" for each in extents)
