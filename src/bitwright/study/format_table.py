"""Which number system for a network: every row of formats executed on a language model and a sentence encoder.

A row is a `FormatAssignment` with a name. Per row: perplexity of the language model and retrieval drift of the encoder
(both executed), stored bits per weight, activation and key-value element, bytes a decoded token moves, and, where the
product of the two codes has hardware, area of its processing element and energy per multiply-accumulate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache as memory
from pathlib import Path
from typing import Any

from bitwright.arithmetic import formats
from bitwright.core import cache
from bitwright.core.errors import BitwrightError, InputError
from bitwright.core.processes import default_processes, each
from bitwright.core.progress import progress, set_quiet
from bitwright.core.quantity import Evidence, Quantity
from bitwright.core.yaml_text import parse_yaml
from bitwright.models.decoder import Decoder
from bitwright.models.format_execution import FormatAssignment, execute_in
from bitwright.models.load import load, weight_paths
from bitwright.models.perplexity import packaged_text, perplexity, text_ids
from bitwright.models.retrieval import embed_pairs, openings, retrieval_drift

LANGUAGE_MODEL, ENCODER, TEXT = "smollm2-135m", "minilm", "kjv-kings.txt"
_VERSION = 1
_SENTENCES = 200
_UNQUANTISED_BITS = 32.0  # what an operand without a format is stored and run in


@dataclass(frozen=True)
class FormatRow:
    """One row of the table."""

    name: str
    assignment: FormatAssignment


def _row(name: str, weights: str | None = None, activations: str | None = None, **others: str) -> FormatRow:
    return FormatRow(name, FormatAssignment(weights, activations, **others))


def _both(name: str) -> FormatRow:
    return _row(f"{name} W+A", name, name)


def default_rows() -> tuple[FormatRow, ...]:
    """The rows that are computed when none are given."""
    cached = {name: {"keys": name, "values": name} for name in ("int8/row", "int4/32", "mxfp4", "bfp12_32")}
    return (
        _row("fp32"),
        _both("fp8_e4m3/row"), _both("fp8_e5m2/row"), _both("mxfp8_e4m3"), _both("mxfp6_e2m3"), _both("mxfp4"),
        _both("mxfp8_e5m2"), _both("mxfp6_e3m2"), _both("fp4_e2m1/row"),
        _both("mxint8"), _both("bfp16_64"), _both("bfp12_32"), _both("int8/row"), _both("int4/row"), _both("int4/32"),
        _row("int4/32 W", "int4/32"),
        _row("int4/32 W, int8/row A", "int4/32", "int8/row"),
        _row("uint4/128 W, int8/row A", "uint4/128", "int8/row"),
        *(FormatRow(f"{name} KV", FormatAssignment(**cached[name])) for name in cached),
        _row("int8/row everywhere", "int8/row", "int8/row", **cached["int8/row"], attention="int8/row"),
        _row("mxfp8_e4m3 everywhere", "mxfp8_e4m3", "mxfp8_e4m3", keys="mxfp8_e4m3", values="mxfp8_e4m3",
             attention="mxfp8_e4m3"),
        _row("int4/32 W, int8/row A, bfp12_32 KV", "int4/32", "int8/row", **cached["bfp12_32"]),
        _row("fp8_e4m3/row W+A, bf16 sums", "fp8_e4m3/row", "fp8_e4m3/row", accumulation="bf16/32"),
        _row("shift5/row W, int8/row A", "shift5/row", "int8/row"),
        _both("lmul_e4m3/row"),
        _row("lmul_e4m3/row attention", keys="lmul_e4m3/row", values="lmul_e4m3/row", attention="lmul_e4m3/row"),
        # the scale of these is searched: once for weights, and for the inputs of a layer once per call
        _row("bipolar4/row W, int8/row A", "bipolar4/row", "int8/row"),
        _row("bipolar2/row W, int8/row A", "bipolar2/row", "int8/row"),
        _both("bipolar4/row"),
        _row("ovp8/row W, ovp8/tensor A", "ovp8/row", "ovp8/tensor"),
        _row("ovp4/row W, ovp4/tensor A", "ovp4/row", "ovp4/tensor"),
    )  # fmt: skip


def read_rows(path: Path) -> tuple[FormatRow, ...]:
    """Rows from a YAML file: a list of mappings with `name` and the fields of `FormatAssignment`.

    Raises InputError for unreadable files, unknown fields or formats, and names that occur twice.
    """
    known = {each.name for each in fields(FormatAssignment)} | {"name"}
    try:
        entries = parse_yaml(path.read_text(), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"Cannot read the rows in {path}: {error}") from None
    if not isinstance(entries, list) or not entries:
        raise InputError(f"{path} holds no rows; expected a list such as `- {{name: weights, weights: int4/32}}`.")
    rows: list[FormatRow] = []
    for number, entry in enumerate(entries, 1):
        if not isinstance(entry, dict) or not all(isinstance(value, str) for value in entry.values()):
            raise InputError(f"{path}: row {number} is {entry!r}; expected names of formats by operand.")
        if unknown := sorted(set(map(str, entry)) - known):
            raise InputError(f"{path}: row {number} has {', '.join(unknown)}; known are {', '.join(sorted(known))}.")
        try:
            assignment = FormatAssignment(**{key: value for key, value in entry.items() if key != "name"})
        except InputError as error:
            raise InputError(f"{path}: row {number}: {error}") from None
        rows.append(FormatRow(entry.get("name", assignment.name), assignment))
    return _checked(rows)


def _checked(rows: Sequence[FormatRow]) -> tuple[FormatRow, ...]:
    names = [row.name for row in rows]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None or not rows:
        raise InputError(f"Two rows are called {twice!r}." if rows else "There are no rows to compute.")
    return tuple(rows)


@dataclass(frozen=True)
class TableSetup:
    """What rows run on: `windows` windows of `window` tokens of the packaged text. Raises InputError for none."""

    windows: int = 64
    window: int = 512
    sentences: int = _SENTENCES

    def __post_init__(self) -> None:
        if self.windows < 1 or self.window < 1 or self.sentences < 2:
            raise InputError(f"{self.windows} windows of {self.window} tokens asked for; expected at least 1 of each.")

    @property
    def tokens(self) -> int:
        """Tokens that are scored."""
        return self.windows * self.window


@dataclass(frozen=True)
class RowResult:
    """A row with its figures by name; `notes` says why one is missing."""

    row: FormatRow
    figures: Mapping[str, Quantity]
    notes: Mapping[str, str] = field(default_factory=dict)


def format_table(
    rows: Sequence[FormatRow], setup: TableSetup | None = None, processes: int | None = None
) -> tuple[RowResult, ...]:
    """Execute every row; results are cached as they finish, so an interrupted table goes on where it stopped.

    Rows run in `processes` processes of one thread each (default: one per core). Raises InputError for two rows of one
    name and for more tokens than the packaged text holds, BitwrightError for a model that is not installed.
    """
    rows, setup = _checked(rows), setup or TableSetup()
    _ids(setup)
    jobs = [(row.assignment, setup) for row in rows]
    made: dict[int, dict[str, Any]] = {}
    workers = processes or default_processes(len(jobs))
    try:
        with progress("Rows of number formats", len(jobs)) as advance:
            for index, stored in each(execute_row, jobs, workers, _one_thread):
                made[index] = stored
                advance(1)
    except KeyboardInterrupt:
        raise BitwrightError(
            f"Interrupted after {len(made)} of {len(jobs)} rows; run it again to go on with the rest."
        ) from None
    return tuple(
        RowResult(row, {name: Quantity.from_json(each) for name, each in made[index].items()})
        for index, row in enumerate(rows)
    )


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)
    set_quiet(True)


def execute_row(assignment: FormatAssignment, setup: TableSetup) -> dict[str, Any]:
    """Figures of one row as JSON, from the cache if it has them."""
    paths = (*weight_paths(LANGUAGE_MODEL), *weight_paths(ENCODER))
    inputs = {
        "version": _VERSION, "weights": [cache.file_digest(path) for path in paths], "text": packaged_text(TEXT).digest,
        "setup": asdict(setup), "assignment": asdict(assignment),
    }  # fmt: skip
    stored: dict[str, Any] = cache.get_or_compute("format-table", inputs, lambda: _execute(assignment, setup))
    return stored


def _execute(assignment: FormatAssignment, setup: TableSetup) -> dict[str, Any]:
    model = load(LANGUAGE_MODEL).decoder
    report = perplexity(
        execute_in(model, assignment), _ids(setup), window=setup.window, description=f"Perplexity, {assignment.name}"
    )
    encoder = load(ENCODER)
    queries, passages = openings(packaged_text(TEXT).content, setup.sentences)
    reference = _reference(setup.sentences)
    changed = embed_pairs(execute_in(encoder.encoder, assignment), encoder.text_tokenizer, queries, passages)
    drift = retrieval_drift(changed, reference)
    source = f"{ENCODER}, {setup.sentences} openings of sentences of {TEXT} looking for the whole sentence"
    figures = {
        "perplexity": replace(report.quantity, source=f"{LANGUAGE_MODEL}, {TEXT}: {report.quantity.source}"),
        "embedding cosine": Quantity(drift.cosine, "", Evidence.EXECUTED, source),
        "recall@1": Quantity(drift.recall, "", Evidence.EXECUTED, source),
        "same first passage": Quantity(drift.agreement, "", Evidence.EXECUTED, source),
        **storage(model, assignment, setup.window),
    }
    return {name: figure.to_json() for name, figure in figures.items()}


@memory
def _reference(sentences: int) -> Any:
    encoder = load(ENCODER)
    return embed_pairs(encoder.encoder, encoder.text_tokenizer, *openings(packaged_text(TEXT).content, sentences))


@memory
def _ids(setup: TableSetup) -> Any:
    from bitwright.models.load import load as loaded

    ids = text_ids(loaded(LANGUAGE_MODEL).text_tokenizer, packaged_text(TEXT), setup.tokens + 1)
    if len(ids) <= setup.tokens:
        raise InputError(
            f"{setup.tokens} tokens asked for; {TEXT} holds {len(ids) - 1}. Take fewer or shorter windows."
        )
    return ids


def _bits(name: str | None, shape: tuple[int, ...]) -> float:
    return _UNQUANTISED_BITS if name is None else formats.parse(name).bits_per_element(shape)


def storage(model: Decoder, assignment: FormatAssignment, context: int) -> dict[str, Quantity]:
    """Bits per element, and bytes that decoding one token at `context` cached tokens moves.

    A decoded token reads every weight of the linear layers and the keys and values of `context` tokens, and writes its
    own. Operands without a format count 32 bits.
    """
    from torch import nn

    shapes = [
        (layer.out_features, layer.in_features) for layer in model.modules() if isinstance(layer, nn.Linear)
    ]  # fmt: skip
    count = sum(rows * inputs for rows, inputs in shapes)
    weight_bits = sum(rows * inputs * _bits(assignment.weights, (rows, inputs)) for rows, inputs in shapes)
    inputs_count = sum(inputs for _, inputs in shapes)
    activation_bits = sum(inputs * _bits(assignment.activations, (1, inputs)) for _, inputs in shapes)
    config = model.config
    head = (1, config.head_dim)
    per_token = [config.layers * config.kv_heads * config.head_dim * _bits(name, head)
                 for name in (assignment.keys, assignment.values)]  # fmt: skip
    elements = 2 * config.layers * config.kv_heads * config.head_dim
    note = "exact count of codes, scales and padding"
    where = f"batch 1, {context} tokens in the cache"
    return {
        "weight bits": Quantity(weight_bits / count, "bit", Evidence.PREDICTED, note),
        "activation bits": Quantity(activation_bits / inputs_count, "bit", Evidence.PREDICTED, note),
        "KV bits": Quantity(sum(per_token) / elements, "bit", Evidence.PREDICTED, note),
        "weight traffic": Quantity(weight_bits / 8, "B", Evidence.PREDICTED, f"per decoded token, {where}"),
        "KV traffic": Quantity((context + 1) * sum(per_token) / 8, "B", Evidence.PREDICTED, f"per token, {where}"),
        "traffic": Quantity(
            (weight_bits + (context + 1) * sum(per_token)) / 8, "B", Evidence.PREDICTED, f"per decoded token, {where}"
        ),
    }
