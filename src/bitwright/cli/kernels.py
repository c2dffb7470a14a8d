"""`bitwright kernels`: native kernels beside their peers and the limits of this machine."""

from __future__ import annotations

from pathlib import Path

import typer
from rich.console import Console

from bitwright.cli.main import app, show, table

commands = typer.Typer(help="Native CPU kernels: timed beside their peers.", no_args_is_help=True)
app.add_typer(commands, name="kernels")


@commands.command("list")
def list_command(as_json: bool = typer.Option(False, "--json", help="Print JSON.")) -> None:
    """List the kernels that `bench` times.

    Example: `bitwright kernels list`
    """
    from bitwright.kernels.benchmark_cases import CASES

    rows = [[name, (make.__doc__ or "").split("\n\n")[0]] for name, make in CASES.items()]
    show(
        [{"kernel": a, "cases": b} for a, b in rows],
        as_json,
        lambda out: out.print(table("Kernels", ["name", "cases"], rows)),
    )


@commands.command("bench")
def bench_command(
    names: list[str] = typer.Argument(
        None, metavar="[NAME]...", help="Kernels of `bitwright kernels list`; default all."
    ),
    threads: list[int] = typer.Option([1, 2], "--threads", "-t", help="Threads; may be given several times."),
    repeats: int = typer.Option(9, "--repeats", "-r", help="Samples per side; medians are compared."),
    output: Path = typer.Option(
        None, "--output", "-o", metavar="FOLDER", help="Write kernels.html (roofline) and results.json."
    ),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Time kernels beside what a user would pick instead, and beside the limit of this machine.

    The limit is predicted from the kernel's counts of operations and bytes and the rates that `bitwright machine
    measure` found (it runs now if it never ran). Peers faster than the kernel are shown as they are.

    Example: `bitwright kernels bench late-dequantisation --threads 1 -o bitwright-out/kernels`
    """
    from bitwright.core.quantity import format_value
    from bitwright.kernels.benchmark import run
    from bitwright.kernels.benchmark_cases import CASES
    from bitwright.study.kernel_page import write_kernel_page
    from bitwright.study.output import check_folder

    if output is not None:
        check_folder(output)
    timings = run(names or [], CASES, threads, repeats)
    rows = []
    for timing in timings:
        peers = ", ".join(f"{name} {each / timing.time_s:.2f}x" for name, each in timing.peers_s.items())
        limit = f"{format_value(timing.limit.time_s, 's')} ({timing.limit.bound})"
        rows.append([
            timing.case.kernel, timing.case.title, str(timing.threads), format_value(timing.time_s, "s"), limit,
            f"{timing.limit.time_s / timing.time_s:.0%}", peers,
        ])  # fmt: skip
    columns = ["kernel", "case", "threads", "time", "limit (predicted)", "of limit", "times as fast as"]
    data = [timing.to_json() for timing in timings]
    written = write_kernel_page(timings, output) if output is not None else []

    def render(out: Console) -> None:
        out.print(table("Kernels", columns, rows, (2, 3, 5)))
        for path in written:
            out.print(f"Wrote {path}", highlight=False)

    show(data, as_json, render)
