"""Cell libraries in the Liberty format: functions, timing and energy tables, leakage, flip-flops, in SI units.

Read: table look-up (NLDM) delay, transition and setup tables, internal energy tables, leakage, capacitances, `ff`
groups. Areas are taken as um2, as every library we know uses them. Energy tables are in voltage_unit^2 *
capacitive_load_unit (Liberty User Guide). Composite current source data is skipped.
"""

from __future__ import annotations

import gzip
import hashlib
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bitwright.core.errors import InputError, UnknownNameError
from bitwright.engine.boolean import Expression, parse_function, truth_table

_COMMENT = re.compile(r"/\*.*?\*/|\\[ \t]*\r?\n", re.S)
_LINE_COMMENT = re.compile(r"(?m)//[^\n\"]*$")
_STATEMENT = re.compile(
    r"""\s*(?:
        (?P<close>\})
      | (?P<none>;)
      | (?P<name>[A-Za-z_][\w.$]*)\s*
        (?: :\s*(?P<value>"[^"]*"|[^;{}"\n]*) [ \t]*;?
          | \((?P<arguments>(?:[^()"]|"[^"]*")*)\)\s*(?P<open>\{)?
        )
    )""",
    re.X,
)
_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")
_NAME = re.compile(r"[A-Za-z_][\w$.\[\]-]*")
_PREFIX = {"": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9, "p": 1e-12, "f": 1e-15, "a": 1e-18, "k": 1e3}
# Cells a mapper must not pick for plain logic, recognised by name where the library does not say so itself.
_SPECIAL_NAME = re.compile(
    r"(?i)lpflow|probe|dlygate|dlymetal|clkdly|^dly|_dly|macro_sparecell|antenna|fill|decap|tap(?:v|_|$)"
)


@dataclass
class Group:
    """One `name (arguments) { ... }` of the file, unconverted; `span` is its place in the text."""

    name: str
    arguments: str
    attributes: dict[str, str] = field(default_factory=dict)
    groups: list[Group] = field(default_factory=list)
    span: tuple[int, int] = (0, 0)

    def named(self, name: str) -> Iterator[Group]:
        """The direct sub-groups called `name`."""
        return (group for group in self.groups if group.name == name)


@dataclass(frozen=True)
class Table:
    """A look-up table `values` (first index, second index); an axis of length one does not matter.

    Delay, transition and energy tables: input transition (s) by load (F). Constraint tables: transition of the
    constrained pin (s) by that of the clock (s).
    """

    first: NDArray[np.float64]
    second: NDArray[np.float64]
    values: NDArray[np.float64]


@dataclass(frozen=True)
class Arc:
    """A timing arc into a pin. Tables by name: cell_rise, cell_fall, rise_transition, fall_transition,
    rise_constraint, fall_constraint."""

    related_pin: str
    kind: str
    sense: str
    tables: dict[str, Table]


@dataclass(frozen=True)
class EnergyArc:
    """Internal energy (J) of one transition of a pin; `related_pin` is empty for an input pin's own energy."""

    related_pin: str
    rise: Table | None
    fall: Table | None


@dataclass(frozen=True)
class Pin:
    """A pin; `capacitance_f` is what it adds to its net, `function` its value in terms of the inputs and state."""

    name: str
    direction: str
    capacitance_f: float
    function: Expression | None
    clock: bool
    arcs: tuple[Arc, ...]
    energy: tuple[EnergyArc, ...]


@dataclass(frozen=True)
class FlipFlop:
    """State `state` and its complement `state_inverse`; takes `next_state` when `clocked_on` rises."""

    state: str
    state_inverse: str
    next_state: Expression
    clocked_on: Expression
    clear: Expression | None
    preset: Expression | None


@dataclass(frozen=True)
class Cell:
    """A cell: area (um2), leakage (W), pins by name, and its flip-flop if it is one."""

    name: str
    area_um2: float
    leakage_w: float
    pins: dict[str, Pin]
    flip_flop: FlipFlop | None

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the input pins."""
        return tuple(pin.name for pin in self.pins.values() if pin.direction == "input")

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the output pins."""
        return tuple(pin.name for pin in self.pins.values() if pin.direction == "output")

    def truth_table(self, output: str) -> int:
        """Truth table of a combinational output over `inputs` (see `boolean.truth_table`).

        Raises InputError when the output has no function.
        """
        function = self.pins[output].function
        if function is None:
            raise InputError(f"Output {output!r} of cell {self.name!r} has no function.")
        return truth_table(function, self.inputs)


class Library:
    """A cell library: cells are converted when asked for, so that large files open quickly."""

    def __init__(self, name: str, text: str, root: Group) -> None:
        self.name = name
        self.text = text
        self._root = root
        self._cells: dict[str, Cell] = {}
        self._groups: dict[str, Group] = {}
        for group in root.named("cell"):
            cell = _unquote(group.arguments)
            if cell in self._groups:
                raise InputError(f"{name}: cell {cell!r} stands in the library twice; remove one of the two.")
            self._groups[cell] = group
        self._templates = {
            _unquote(group.arguments): group
            for kind in ("lu_table_template", "power_lut_template")
            for group in root.named(kind)
        }
        attributes = root.attributes
        self._time_s = _unit(attributes.get("time_unit", "1ns"), "s", "time_unit", name)
        self._leakage_w = _unit(attributes.get("leakage_power_unit", "1nW"), "W", "leakage_power_unit", name)
        volt = _unit(attributes.get("voltage_unit", "1V"), "V", "voltage_unit", name)
        load = attributes.get("capacitive_load_unit", "1,pf").replace('"', "").split(",")
        if len(load) != 2:
            raise InputError(f"{name}: capacitive_load_unit {','.join(load)!r} is not '(number, unit)'.")
        count = _number(load[0], "capacitive_load_unit", name)
        self._load_f = count * _unit("1" + load[1].strip(), "F", "capacitive_load_unit", name)
        if not self._load_f > 0:
            raise InputError(f"{name}: capacitive_load_unit is {count:g}; expected more than 0.")
        self._energy_j = volt * volt * self._load_f
        self.voltage_v = volt * self._voltage()

    def _voltage(self) -> float:
        attributes = self._root.attributes
        wanted = _unquote(attributes.get("default_operating_conditions", ""))
        conditions = {_unquote(group.arguments): group for group in self._root.named("operating_conditions")}
        chosen = conditions.get(wanted) or (next(iter(conditions.values())) if len(conditions) == 1 else None)
        text = (chosen.attributes.get("voltage") if chosen else None) or attributes.get("nom_voltage")
        if text is None:
            raise InputError(f"{self.name}: no supply voltage: neither operating_conditions nor nom_voltage give one.")
        voltage = _number(text, "voltage", self.name)
        if not 0 < voltage < float("inf"):
            raise InputError(f"{self.name}: the supply voltage is {voltage:g}; expected more than 0.")
        return voltage

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the library's text."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    @property
    def cell_names(self) -> tuple[str, ...]:
        """Names of all cells of the library."""
        return tuple(self._groups)

    def cell(self, name: str) -> Cell:
        """The cell `name`. Raises UnknownNameError when the library does not have it."""
        if name not in self._cells:
            if name not in self._groups:
                raise UnknownNameError(f"cell of library {self.name}", name, self._groups)
            self._cells[name] = self._convert(self._groups[name])
        return self._cells[name]

    @cached_property
    def mappable(self) -> tuple[str, ...]:
        """Names of the cells synthesis may use: single-output logic of up to six inputs and plain flip-flops.

        Raises InputError when no flip-flop or no inverter is among them, or one has no area or no delays.
        """
        kept = tuple(name for name in self._groups if self.exclusion(name) is None)
        if not any(self.cell(name).flip_flop for name in kept):
            raise InputError(
                f"Library {self.name} has no flip-flop that synthesis can use (an `ff` group clocked on the rising "
                "edge, without scan). Give a library with sequential cells."
            )
        self._smallest_inverter(kept)
        for cell in map(self.cell, kept):
            self._check_usable(cell)
        return kept

    def check_energy(self) -> None:
        """Raise InputError for a library without energy tables, from which only the charging of nets could be had."""
        if not any(pin.energy for name in self.mappable for pin in self.cell(name).pins.values()):
            raise InputError(
                f"Library {self.name} has no internal_power tables, so the energy of its cells is unknown; "
                "only areas and delays can be had."
            )

    def _check_usable(self, cell: Cell) -> None:
        advice = "Add what is missing, or mark the cell `dont_use : true;`."
        if not _NAME.fullmatch(cell.name):
            raise InputError(f"Library {self.name}: {cell.name!r} is no name of a cell; use letters, digits and _.")
        group = self._groups[cell.name]
        given = "cell_leakage_power" in group.attributes or "default_cell_leakage_power" in self._root.attributes
        if not given and not any("value" in state.attributes for state in group.named("leakage_power")):
            raise InputError(f"Library {self.name}: cell {cell.name!r} has no cell_leakage_power. {advice}")
        for name in cell.inputs:
            if not cell.pins[name].capacitance_f > 0:
                raise InputError(
                    f"Library {self.name}: input {name!r} of cell {cell.name!r} has the capacitance "
                    f"{cell.pins[name].capacitance_f:g} F; expected more. {advice}"
                )
        if not cell.area_um2 > 0:
            raise InputError(
                f"Library {self.name}: cell {cell.name!r} has the area {cell.area_um2:g}; expected more. {advice}"
            )
        for name in cell.outputs:
            tables = {table for arc in cell.pins[name].arcs for table in arc.tables}
            if not {"cell_rise", "cell_fall"} <= tables:
                raise InputError(
                    f"Library {self.name}: output {name!r} of cell {cell.name!r} has no cell_rise and cell_fall "
                    f"tables, so its delay is unknown. {advice}"
                )

    def exclusion(self, name: str) -> str | None:
        """Why synthesis must not use a cell, or None when it may. Raises InputError for a missing function."""
        group = self._groups[name]
        attributes = group.attributes
        pins = [pin for pin in group.groups if pin.name == "pin"]
        if _true(attributes.get("dont_use")) or _true(attributes.get("dont_touch")):
            return "the library says dont_use"
        if _SPECIAL_NAME.search(name):
            return "delay, fill, probe or low-power cell"
        for flag in ("clock_gating_integrated_cell", "is_level_shifter", "is_isolation_cell", "retention_cell",
                     "always_on", "is_macro_cell", "switch_cell_type"):  # fmt: skip
            if flag in attributes and attributes[flag] != "false":
                return flag
        kinds = {child.name for child in group.groups}
        for kind in ("latch", "latch_bank", "ff_bank", "statetable", "test_cell", "memory", "bus", "bundle"):
            if kind in kinds:
                return f"has a {kind} group"
        if any("three_state" in pin.attributes for pin in pins):
            return "tri-state"
        if any(_unquote(pin.attributes.get("direction", "")) == "inout" for pin in pins):
            return "bidirectional pin"
        for pin in pins:
            if "direction" not in pin.attributes:
                raise InputError(
                    f"Library {self.name}: pin {_unquote(pin.arguments)!r} of cell {name!r} has no direction."
                )
        outputs = [pin for pin in pins if _unquote(pin.attributes.get("direction", "")) == "output"]
        if not outputs or len(pins) == len(outputs):
            return "no logic"
        for pin in outputs:
            if "function" not in pin.attributes:
                raise InputError(
                    f"Library {self.name}: output {_unquote(pin.arguments)!r} of cell {name!r} has no function. "
                    "Add it, or mark the cell `dont_use : true;`."
                )
        if "ff" in kinds:
            return self._flip_flop_exclusion(name)
        if len(outputs) > 1:
            return "more than one output"
        return "more than six inputs" if len(pins) - 1 > 6 else None

    def _flip_flop_exclusion(self, name: str) -> str | None:
        flip_flop = self.cell(name).flip_flop
        assert flip_flop is not None
        if flip_flop.clear is not None or flip_flop.preset is not None:
            return "asynchronous clear or preset"
        if flip_flop.clocked_on.operator != "var":
            return "clocked on the falling edge"
        return None if flip_flop.next_state.operator == "var" else "enable, scan or inverted data"

    def _smallest_inverter(self, names: tuple[str, ...]) -> Cell:
        single = [cell for cell in map(self.cell, names) if cell.flip_flop is None and len(cell.inputs) == 1]
        inverters = [cell for cell in single if cell.truth_table(cell.outputs[0]) == 1]
        if not inverters:
            raise InputError(f"Library {self.name} has no inverter; synthesis needs one.")
        return min(inverters, key=lambda cell: (cell.area_um2, cell.pins[cell.inputs[0]].capacitance_f))

    @cached_property
    def unit_load_f(self) -> float:
        """Input capacitance of the smallest inverter."""
        inverter = self._smallest_inverter(self.mappable)
        return inverter.pins[inverter.inputs[0]].capacitance_f

    @cached_property
    def driver(self) -> str:
        """The cell taken to drive input ports when sizing gates: the second smallest buffer, else an inverter."""
        cells = [self.cell(name) for name in self.mappable]
        buffers = [cell for cell in cells if cell.flip_flop is None and len(cell.inputs) == 1
                   and cell.truth_table(cell.outputs[0]) == 0b10]  # fmt: skip
        buffers.sort(key=lambda cell: (cell.area_um2, cell.name))
        return buffers[min(1, len(buffers) - 1)].name if buffers else self._smallest_inverter(self.mappable).name

    @cached_property
    def mapping_text(self) -> str:
        """The file with only the mappable cells and what mapping needs of them, which tools read much faster."""
        kept, pieces, at = set(self.mappable), [], 0
        for name, group in self._groups.items():
            unneeded = ("internal_power", "leakage_power")
            inner = [*group.groups, *(child for pin in group.groups for child in pin.groups)]
            spans = [child.span for child in inner if child.name in unneeded] if name in kept else [group.span]
            for start, end in sorted(spans):
                pieces.append(self.text[at:start])
                at = end
        return "".join(pieces) + self.text[at:]

    def _convert(self, group: Group) -> Cell:
        name = _unquote(group.arguments)
        where = f"{self.name}, cell {name!r}"
        if "cell_leakage_power" in group.attributes:
            leakage = _number(group.attributes["cell_leakage_power"], "cell_leakage_power", where)
        else:
            states = [_number(state.attributes["value"], "leakage", where)
                      for state in group.named("leakage_power") if "value" in state.attributes]  # fmt: skip
            default = _number(self._root.attributes.get("default_cell_leakage_power", "0"), "leakage", where)
            leakage = sum(states) / len(states) if states else default
        if not 0 <= leakage < float("inf"):
            raise InputError(f"{where}: its leakage is {leakage:g}; expected 0 or more.")
        pins = {}
        for pin_group in group.named("pin"):
            for pin_name in _unquote(pin_group.arguments).replace(",", " ").split():
                pins[pin_name] = self._pin(pin_group, pin_name, where)
        area = _number(group.attributes.get("area", "0"), "area", where)
        if not 0 <= area < float("inf"):
            raise InputError(f"{where}: its area is {area:g} um2; expected 0 or more.")
        ff = next(group.named("ff"), None)
        cell = Cell(name, area, leakage * self._leakage_w, pins, _flip_flop(ff, where) if ff else None)
        stateful = [child.arguments for child in group.groups if child.name in ("ff", "latch", "ff_bank", "latch_bank")]
        _check_names(cell, {state.strip() for text in stateful for state in text.replace('"', "").split(",")}, where)
        return cell

    def _pin(self, group: Group, name: str, where: str) -> Pin:
        attributes = group.attributes
        direction = _unquote(attributes.get("direction", ""))
        default = self._root.attributes.get(f"default_{direction}_pin_cap", "0")
        capacitance = attributes.get("capacitance", default)
        function = attributes.get("function")
        arcs = []
        for timing in group.named("timing"):
            tables = {table.name: self._table(table, self._time_s, where) for table in timing.groups
                      if table.name in ("cell_rise", "cell_fall", "rise_transition", "fall_transition",
                                        "rise_constraint", "fall_constraint")}  # fmt: skip
            sense = _unquote(timing.attributes.get("timing_sense", "non_unate"))
            kind = _unquote(timing.attributes.get("timing_type", "combinational"))
            arcs += [Arc(pin, kind, sense, tables)
                     for pin in _unquote(timing.attributes.get("related_pin", "")).split()]  # fmt: skip
        energy = []
        for power in group.named("internal_power"):
            found = {table.name: self._table(table, self._energy_j, where) for table in power.groups}
            rise = found.get("rise_power", found.get("power"))
            fall = found.get("fall_power", found.get("power"))
            related = _unquote(power.attributes.get("related_pin", "")).split() or [""]
            energy += [EnergyArc(pin, rise, fall) for pin in related]
        return Pin(
            name,
            direction,
            _number(capacitance, "capacitance", where) * self._load_f,
            _function(function, f"{where}, output {name!r}")
            if function is not None and direction == "output"
            else None,
            _true(attributes.get("clock")),
            tuple(arcs),
            tuple(energy),
        )

    def _table(self, group: Group, unit: float, where: str) -> Table:
        values = _numbers(group.attributes.get("values", ""), where)
        template = self._templates.get(_unquote(group.arguments))
        axes: list[tuple[str, NDArray[np.float64]]] = []
        if template is not None:
            for place in ("1", "2", "3"):
                if f"variable_{place}" in template.attributes:
                    index = group.attributes.get(f"index_{place}", template.attributes.get(f"index_{place}", ""))
                    axes.append((_unquote(template.attributes[f"variable_{place}"]), _numbers(index, where)))
        elif values.size != 1:
            raise InputError(
                f"{where}: table {group.name} uses the template {group.arguments!r}, which is not defined."
            )
        if len(axes) > 2 or values.size != int(np.prod([axis.size for _, axis in axes] or [1])):
            raise InputError(
                f"{where}: table {group.name} has {values.size} values for axes of "
                f"{' x '.join(str(axis.size) for _, axis in axes) or 'nothing'}; one or two axes are supported."
            )
        for variable, axis in axes:
            if not (np.diff(axis) > 0).all() or not np.isfinite(axis).all():
                raise InputError(f"{where}: table {group.name} has an axis {variable} that does not rise throughout.")
        if not np.isfinite(values).all():
            raise InputError(f"{where}: table {group.name} holds values that are not finite.")
        block = values.reshape([axis.size for _, axis in axes] or [1]) * unit
        scaled = [(variable, axis * (self._load_f if "capacitance" in variable else self._time_s))
                  for variable, axis in axes]  # fmt: skip
        none = np.zeros(1)
        seconds = ("total_output_net_capacitance", "related_out_total_output_net_capacitance", "related_pin_transition")
        if not scaled:
            return Table(none, none, block.reshape(1, 1))
        if len(scaled) == 1:
            variable, axis = scaled[0]
            return Table(none, axis, block[None, :]) if variable in seconds else Table(axis, none, block[:, None])
        if scaled[0][0] in seconds:
            return Table(scaled[1][1], scaled[0][1], np.ascontiguousarray(block.T))
        return Table(scaled[0][1], scaled[1][1], block)


def _function(text: str, where: str) -> Expression:
    try:
        return parse_function(_unquote(text))
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def _check_names(cell: Cell, states: set[str], where: str) -> None:
    """Raise InputError when a function of `cell` uses a name that is neither a pin nor a state."""
    functions = {f"the function of output {pin.name!r}": pin.function for pin in cell.pins.values()}
    if cell.flip_flop is not None:
        functions |= {"next_state": cell.flip_flop.next_state, "clocked_on": cell.flip_flop.clocked_on}
    for what, function in functions.items():
        for name in function.variables() if function is not None else ():
            if name not in cell.pins and name not in states:
                known = ", ".join([*cell.pins, *sorted(states)])
                raise InputError(f"{where}: {what} uses {name!r}, which is neither a pin nor a state. Known: {known}.")


def _flip_flop(group: Group, where: str) -> FlipFlop:
    states = [part.strip() for part in group.arguments.replace('"', "").split(",")]
    attributes = {name: _unquote(value) for name, value in group.attributes.items()}
    for needed in ("next_state", "clocked_on"):
        if needed not in attributes:
            raise InputError(f"{where}: its ff group has no {needed}.")
    return FlipFlop(
        states[0],
        states[1] if len(states) > 1 else "",
        _function(attributes["next_state"], f"{where}, next_state"),
        _function(attributes["clocked_on"], f"{where}, clocked_on"),
        _function(attributes["clear"], f"{where}, clear") if "clear" in attributes else None,
        _function(attributes["preset"], f"{where}, preset") if "preset" in attributes else None,
    )


def read_liberty(path: Path) -> Library:
    """Read a Liberty file, plain or gzip-compressed.

    Raises InputError when the file is missing, is not Liberty, or ends early; the message says where.
    """
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8", "replace")
    except OSError as error:
        raise InputError(f"Cannot read the cell library {path}: {error.strerror or error}.") from error
    except (EOFError, zlib.error) as error:
        raise InputError(f"The cell library {path} is damaged or cut off: {error}.") from error
    return parse_liberty(text, str(path))


def parse_liberty(text: str, source: str) -> Library:
    """Parse the text of a Liberty file; `source` names it in errors. Raises InputError as `read_liberty`."""
    text = _COMMENT.sub(lambda match: "\n" * match.group().count("\n") or " ", text)
    text = _LINE_COMMENT.sub("", text)
    root = _parse_groups(text, source)
    if root.name != "library":
        raise InputError(f"{source} is not a Liberty file: it starts with {root.name!r} instead of 'library'.")
    library = Library(_unquote(root.arguments) or source, text, root)
    if not library.cell_names:
        raise InputError(f"The library {source} holds no cells.")
    return library


def _parse_groups(text: str, source: str) -> Group:
    stack: list[Group] = []
    position, end, match_at = 0, len(text), _STATEMENT.match
    while position < end:
        match = match_at(text, position)
        if match is None:
            if not text[position:].strip():
                break
            raise _unreadable(text, position, source, not stack)
        position = match.end()
        close, none, name, value, arguments, opened = match.groups()
        if close:
            if not stack:
                raise _unreadable(text, match.start(), source, False)
            group = stack.pop()
            group.span = (group.span[0], position)
            if not stack:
                return group
        elif opened:
            group = Group(name, arguments, span=(match.start(), 0))
            if stack:
                stack[-1].groups.append(group)
            stack.append(group)
        elif none is None:
            if not stack:
                raise _unreadable(text, match.start(), source, True)
            stack[-1].attributes[name] = arguments if value is None else value.strip()
    if not stack:
        raise _unreadable(text, 0, source, True)
    inner = f"{stack[-1].name} ({_unquote(stack[-1].arguments)})"
    raise InputError(f"The library {source} ends early: {inner} is not closed. The file seems cut off.")


def _unreadable(text: str, position: int, source: str, outside: bool) -> InputError:
    rest = text[position:].lstrip()
    line = text.count("\n", 0, len(text) - len(rest)) + 1
    if outside:
        return InputError(f"{source} is not a Liberty file: expected 'library (name) {{', found {rest[:30]!r}.")
    if rest.count('"') % 2 or not rest.rstrip().endswith("}"):
        return InputError(f"The library {source} ends early: the statement in line {line} is not closed.")
    return InputError(f"{source}, line {line}: cannot read {rest.splitlines()[0][:60]!r} as Liberty.")


def _unquote(text: str) -> str:
    return text.strip().strip('"').strip()


def _true(text: str | None) -> bool:
    return text is not None and _unquote(text).lower() == "true"


def _number(text: str, what: str, where: str) -> float:
    try:
        return float(_unquote(text))
    except ValueError:
        raise InputError(f"{where}: {what} {text!r} is not a number.") from None


def _numbers(text: str, where: str) -> NDArray[np.float64]:
    try:
        values = np.array(text.replace('"', " ").replace(",", " ").split(), dtype=np.float64)
    except ValueError:
        raise InputError(f"{where}: the table values {text[:40]!r}... are not numbers.") from None
    return values


def _unit(text: str, base: str, what: str, where: str) -> float:
    plain = _unquote(text).replace(" ", "")
    number = _NUMBER.match(plain)
    suffix = plain[number.end() :] if number else ""
    scale = _PREFIX.get(suffix[:-1]) if suffix[-1:].lower() == base.lower() else None
    if number is None or scale is None:
        raise InputError(f"{where}: {what} {text!r} is not a number with a unit such as '1n{base}'.")
    if not float(number.group()) > 0:
        raise InputError(f"{where}: {what} {text!r} is not more than 0.")
    return float(number.group()) * scale
