"""`bitwright machine`: presets, one machine with its sources, and measuring this computer."""

from __future__ import annotations

import typer
from rich.console import Console

from bitwright.cli.main import app, show, table
from bitwright.core.errors import InputError

commands = typer.Typer(
    help="Machines: devices, memories and links, every figure with its source.", no_args_is_help=True
)
app.add_typer(commands, name="machine")


@commands.command("list")
def list_command(as_json: bool = typer.Option(False, "--json", help="Print JSON.")) -> None:
    """List the machine presets and the memory presets.

    Example: `bitwright machine list`
    """
    from bitwright.core.machine import THIS_MACHINE, list_machines, load_machine, memory_presets, this_machine_path

    machines = {name: load_machine(name).title for name in list_machines() if name != THIS_MACHINE}
    measured = this_machine_path().exists()
    machines[THIS_MACHINE] = (
        load_machine(THIS_MACHINE).title if measured else "not measured yet: bitwright machine measure"
    )
    memories = {name: preset.title for name, preset in memory_presets().items()}

    def render(out: Console) -> None:
        out.print(table("Machines", ["name", "what it is"], [list(row) for row in machines.items()]))
        out.print(table("Memories (for studies)", ["name", "what it is"], [list(row) for row in memories.items()]))

    show({"machines": machines, "memories": memories}, as_json, render)


@commands.command("show")
def show_command(
    name: str = typer.Argument(..., metavar="NAME", help="A preset, this-machine, or the path of a machine file."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
    as_yaml: bool = typer.Option(False, "--yaml", help="Print the machine file."),
) -> None:
    """Show a machine: every figure with its evidence and source.

    Example: `bitwright machine show a100-80g`
    """
    from bitwright.core.machine import load_machine

    if as_yaml and as_json:
        raise InputError("Give --json or --yaml, not both.")
    machine = load_machine(name)
    if as_yaml:
        print(machine.to_yaml(), end="")
        return
    rows = [[row["figure"], row["value"], row["evidence"], row["source"]] for row in machine.describe()]
    columns = ["figure", "value", "evidence", "source"]
    show(machine.to_json(), as_json, lambda out: out.print(table(machine.title, columns, rows, (1,))))


@commands.command("measure")
def measure_command(
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Measure this computer and keep the result as the machine `this-machine`.

    Example: `bitwright machine measure`, then `bitwright trace llama-3-8b --machine this-machine`
    """
    from bitwright.core.measure import measure_and_store

    machine, path = measure_and_store()
    rows = [[row["figure"], row["value"], row["evidence"], row["source"]] for row in machine.describe()]

    def render(out: Console) -> None:
        out.print(table(machine.title, ["figure", "value", "evidence", "source"], rows, (1,)))
        out.print(f"Kept as this-machine in {path}", highlight=False)

    show(machine.to_json(), as_json, render)
