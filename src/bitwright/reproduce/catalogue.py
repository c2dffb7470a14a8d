"""The catalogue of the 76 published systems that Bitwright holds or plans.

A system is `planned` until it has a module here, named after its slug with underscores. Such a module has
`STATUS` ("started" or "complete"), `ENTRY_POINTS` (dotted names of the public functions that hold the technique) and
`claims()`, the tuple of its claims.
"""

from __future__ import annotations

import csv
import importlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from types import ModuleType

from bitwright.core.errors import BitwrightError, UnknownNameError
from bitwright.core.progress import progress
from bitwright.reproduce.claims import Claim, ClaimResult, check

PLANNED = "planned"


@dataclass(frozen=True)
class System:
    """One published system."""

    number: str
    slug: str
    title: str

    @property
    def module_name(self) -> str:
        """The dotted name its module has, or will have."""
        return f"bitwright.reproduce.{self.slug.replace('-', '_')}"

    @property
    def status(self) -> str:
        """`planned`, `started` (some claims) or `complete` (all of them)."""
        module = self._module()
        return str(module.STATUS) if module else PLANNED

    @property
    def entry_points(self) -> tuple[str, ...]:
        """Dotted names of the functions that hold the technique."""
        module = self._module()
        return tuple(module.ENTRY_POINTS) if module else ()

    def claims(self) -> tuple[Claim, ...]:
        """Its claims. Raises BitwrightError while it is planned."""
        module = self._module()
        if module is None:
            raise BitwrightError(f"{self.slug} ({self.title}) is planned; nothing of it can be reproduced yet.")
        return tuple(module.claims())

    def _module(self) -> ModuleType | None:
        if importlib.util.find_spec(self.module_name) is None:
            return None
        return importlib.import_module(self.module_name)


def systems() -> tuple[System, ...]:
    """All 76 systems in the order of their numbers."""
    with (files("bitwright.reproduce") / "systems.tsv").open(encoding="utf-8") as table:
        return tuple(System(**row) for row in csv.DictReader(table, delimiter="\t"))


def system(slug: str) -> System:
    """One system by its slug or its number. Raises UnknownNameError, which lists the slugs."""
    for entry in systems():
        if slug in (entry.slug, entry.number):
            return entry
    raise UnknownNameError("system", slug, [entry.slug for entry in systems()])


def reproduce(slug: str) -> list[ClaimResult]:
    """Measure every claim of a system and set it beside the published figure."""
    claims = system(slug).claims()
    results = []
    with progress(f"Reproducing {slug}", len(claims)) as advance:
        for claim in claims:
            results.append(check(claim))
            advance(1)
    return results


def markdown(entries: Sequence[System]) -> str:
    """The catalogue page of the manual."""
    built = sum(entry.status != PLANNED for entry in entries)
    lines = [
        "# Catalogue of systems",
        "",
        f"Bitwright sets out to hold {len(entries)} published systems as working, reusable parts; {built} of them have",
        "entered so far. `bitwright systems` prints this table, `bitwright reproduce SLUG` runs a system's claims.",
        "",
        "| no. | system | status | paper | entry points |",
        "|---|---|---|---|---|",
    ]
    for entry in entries:
        points = "<br>".join(f"`{point}`" for point in entry.entry_points)
        lines.append(f"| {entry.number} | {entry.slug} | {entry.status} | {entry.title} | {points} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown(systems()), end="")
