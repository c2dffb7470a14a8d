"""A workload from whatever names a network: an ONNX file, a configuration, a config.json, or a model with weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from bitwright.core.errors import InputError, UnknownNameError
from bitwright.core.trace_onnx import trace_onnx
from bitwright.core.workload import Role, Workload
from bitwright.models.configurations import CONFIGURATIONS, TransformerConfiguration, configuration_from_json
from bitwright.models.trace_configuration import Phase, trace_configuration


def trace(
    model: str, phase: Phase = "prefill", batch: int = 1, tokens: int = 512, context: int = 0,
    dimensions: Mapping[str, int] | None = None, formats: Mapping[Role, str] | None = None,
) -> Workload:  # fmt: skip
    """The workload of `model`: an ONNX path, a configuration's name, a config.json or its folder, or a model's name.

    `phase`, `batch`, `tokens` and `context` are those of `trace_configuration`; an ONNX file takes its extents from
    `dimensions` alone. A model with weights is traced by the sizes its file states.

    Raises UnknownNameError for a name that is neither known nor a path (it lists the configurations), InputError for
    files and extents that cannot be used.
    """
    path = Path(model)
    if path.suffix == ".onnx":
        workload = trace_onnx(path, dimensions)
        return workload.with_formats(formats) if formats else workload
    if dimensions:
        raise InputError(f"Dimensions ({', '.join(dimensions)}) are for ONNX files; {model!r} takes batch and tokens.")
    if model.lower() in CONFIGURATIONS:
        described: TransformerConfiguration = CONFIGURATIONS[model.lower()]
    elif (path.suffix == ".json" and path.exists()) or (path / "config.json").is_file():
        described = configuration_from_json(path)
    else:
        described = _of_weights(model)
    return trace_configuration(described, phase, batch, tokens, context, formats)


def _of_weights(model: str) -> TransformerConfiguration:
    from bitwright.models.decoder import DecoderConfig
    from bitwright.models.encoder import EncoderConfig
    from bitwright.models.load import KNOWN_MODELS, load

    path = Path(model)
    if model not in KNOWN_MODELS and not path.exists():
        if "/" in model or path.suffix in (".gguf", ".json", ".safetensors"):
            raise InputError(f"There is no model file or folder at {path}.")
        raise UnknownNameError("model", model, {*CONFIGURATIONS, *KNOWN_MODELS})
    sizes = load(model).config
    if isinstance(sizes, DecoderConfig):
        return TransformerConfiguration(
            model, sizes.hidden, sizes.layers, sizes.heads, sizes.feed_forward, sizes.vocabulary, sizes.kv_heads,
            sizes.head_dim, gated=True, activation="silu", norm="rms", bias=False, qkv_bias=False,
            tied_head=sizes.tied_embeddings,
        )  # fmt: skip
    if isinstance(sizes, EncoderConfig):
        return TransformerConfiguration(
            model, sizes.hidden, sizes.layers, sizes.heads, sizes.feed_forward, sizes.vocabulary,
            positions=sizes.max_positions, family="encoder", segments=sizes.segments,
        )  # fmt: skip
    raise InputError(f"{model!r} states no sizes of a transformer; give a configuration or an ONNX file.")
