"""The catalogue of the 76 published systems that Bitwright holds or plans.

A system is `planned` until it has a module here, named after its slug with underscores. Such a module has
`STATUS` ("started" or "complete"), `ENTRY_POINTS` (dotted names of the public functions that hold the technique) and
`claims()`, the tuple of its claims.
"""

from __future__ import annotations

import csv
import importlib
import importlib.util
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from types import ModuleType

from bitwright.core.errors import BitwrightError, UnknownNameError
from bitwright.core.progress import progress
from bitwright.reproduce.claims import Claim, ClaimResult, Verdict, check

PLANNED = "planned"
_COUNTED = {
    Verdict.AGREES: "agree", Verdict.EXCEEDS: "exceed", Verdict.DIFFERS: "differ", Verdict.REPORTED: "reported",
    Verdict.UNAVAILABLE: "unavailable",
}  # fmt: skip


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


def stored_results(slug: str) -> list[ClaimResult]:
    """The results of the last whole run that was kept with Bitwright; empty where none was."""
    path = files("bitwright.reproduce") / "results" / f"{system(slug).slug}.json"
    return [ClaimResult.from_json(row) for row in json.loads(path.read_text("utf-8"))] if path.is_file() else []


def verdict_counts(results: Sequence[ClaimResult]) -> str:
    """How many claims have which verdict, such as "12 agree, 3 reported"."""
    counts = Counter(result.verdict for result in results)
    return ", ".join(f"{counts[verdict]} {_COUNTED[verdict]}" for verdict in Verdict if counts[verdict])
