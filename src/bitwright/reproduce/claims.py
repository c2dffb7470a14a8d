"""Claims of a published system: what was published, what we find, and how the two compare."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal

from bitwright.core.errors import BitwrightError
from bitwright.core.quantity import Quantity


class Verdict(StrEnum):
    """How our figure compares with the published one."""

    AGREES = "agrees"  # within the tolerance
    EXCEEDS = "exceeds"  # outside the tolerance, on the better side
    DIFFERS = "differs"  # outside the tolerance otherwise; the explanation says why
    REPORTED = "reported"  # shown beside the published figure, not comparable under the same conditions
    UNAVAILABLE = "unavailable"  # could not be measured here (a missing cell library, for example)


@dataclass(frozen=True)
class Claim:
    """One published figure, its conditions, and the function that finds ours.

    `tolerance` is relative (0.03 = within 3 %); None means that conditions differ too much for a verdict.
    `explanation` says where a difference comes from, when there is one. `better`: which side of the published figure
    counts as better, "higher" or "lower"; empty where a difference is a difference.
    """

    name: str
    conditions: str
    published: Quantity
    measure: Callable[[], Quantity]
    tolerance: float | None
    explanation: str = ""
    better: Literal["", "higher", "lower"] = ""


@dataclass(frozen=True)
class ClaimResult:
    """A claim after it was measured."""

    name: str
    conditions: str
    published: Quantity
    ours: Quantity | None
    verdict: Verdict
    explanation: str

    def to_json(self) -> dict[str, Any]:
        """JSON values of every field."""
        return {
            "name": self.name,
            "conditions": self.conditions,
            "published": self.published.to_json(),
            "ours": self.ours.to_json() if self.ours else None,
            "verdict": str(self.verdict),
            "explanation": self.explanation,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ClaimResult:
        """The result that `to_json` wrote."""
        ours = Quantity.from_json(data["ours"]) if data["ours"] else None
        return cls(
            data["name"], data["conditions"], Quantity.from_json(data["published"]), ours, Verdict(data["verdict"]),
            data["explanation"],
        )  # fmt: skip


def check(claim: Claim) -> ClaimResult:
    """Measure one claim. What cannot be measured here is reported as unavailable, with the reason."""
    try:
        ours = claim.measure()
    except BitwrightError as error:
        return ClaimResult(claim.name, claim.conditions, claim.published, None, Verdict.UNAVAILABLE, str(error))
    verdict = Verdict.REPORTED
    if claim.tolerance is not None:
        difference = ours.value - claim.published.value
        if abs(difference) <= claim.tolerance * abs(claim.published.value):
            verdict = Verdict.AGREES
        else:
            verdict = Verdict.EXCEEDS if claim.better == ("higher" if difference > 0 else "lower") else Verdict.DIFFERS
    return ClaimResult(claim.name, claim.conditions, claim.published, ours, verdict, claim.explanation)
