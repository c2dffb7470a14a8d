"""The catalogue in the manual: one page of all systems, and one per system whose claims were run and kept."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from bitwright.core.files import write_whole
from bitwright.core.quantity import format_value
from bitwright.reproduce.catalogue import PLANNED, System, stored_results, systems, verdict_counts
from bitwright.reproduce.claims import ClaimResult


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def overview(entries: Sequence[System]) -> str:
    """The page of all systems."""
    built = sum(entry.status != PLANNED for entry in entries)
    lines = [
        "# Catalogue of systems",
        "",
        f"Bitwright sets out to hold {len(entries)} published systems as working, reusable parts; {built} of them have",
        "entered so far. `bitwright systems` prints this table, `bitwright reproduce SLUG` runs a system's claims.",
        "Claims are the published figures: ours agree within the stated tolerance, exceed it on the better side,",
        "differ, or are reported where conditions differ too much for a verdict. A system's page names the evidence.",
        "",
        "| no. | system | status | claims | paper | entry points |",
        "|---|---|---|---|---|---|",
    ]
    for entry in entries:
        points = "<br>".join(f"`{point}`" for point in entry.entry_points)
        results = stored_results(entry.slug)
        name = f"[{entry.slug}](catalogue/{entry.slug}.md)" if results else entry.slug
        counts = verdict_counts(results)
        lines.append(f"| {entry.number} | {name} | {entry.status} | {counts} | {_cell(entry.title)} | {points} |")
    return "\n".join(lines) + "\n"


def page(entry: System, results: Sequence[ClaimResult]) -> str:
    """The page of one system: every claim, published and ours, and the reasons for differences."""
    notes = list(dict.fromkeys(result.explanation for result in results if result.explanation))
    lines = [
        f"# {entry.slug}", "", f"*{entry.title}*: {verdict_counts(results)}.", "",
        f"Measured by `bitwright reproduce {entry.slug}`.", "",
        "| claim | conditions | published | ours | evidence | verdict |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for result in results:
        published = format_value(result.published.value, result.published.unit)
        ours = format_value(result.ours.value, result.ours.unit) if result.ours else ""
        evidence = str(result.ours.evidence) if result.ours else ""
        note = f" ({notes.index(result.explanation) + 1})" if result.explanation else ""
        cells = [result.name, result.conditions, published, ours, evidence, result.verdict + note]
        lines.append(f"| {' | '.join(map(_cell, cells))} |")
    lines.append("")
    lines += [f"({number}) {_cell(note)}\n" for number, note in enumerate(notes, 1)]
    return "\n".join(lines)


def write_pages(docs: Path) -> None:
    """Write `catalogue.md` and `catalogue/SLUG.md` into the manual's folder."""
    entries = systems()
    write_whole(docs / "catalogue.md", overview(entries))
    for entry in entries:
        results = stored_results(entry.slug)
        if results:
            write_whole(docs / "catalogue" / f"{entry.slug}.md", page(entry, results))


if __name__ == "__main__":
    write_pages(Path(sys.argv[1]))
