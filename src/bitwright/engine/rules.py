"""The rules of the notation, by number, and the error that names the one a nest or a move breaks.

Source: arXiv 2503.06342, the notation; rules as restated in `bitwright.engine.legality`.
"""

from __future__ import annotations

from bitwright.core.errors import InputError

RULES = {
    1: "only sums may read all words of a dimension, and sums move freely over K and BW",
    2: "shift leaves the loop over K only if BW is outside that loop; bit weights meet only shifted",
    3: "an addition leaves a temporal loop only if the state is a carry-save pair",
    4: "a loop over non-zero digits is data dependent: the array must synchronise",
    5: "encode may be hoisted above loops over N, map may not",
    6: "the state must hold the largest sum",
}


class IllegalTransformation(InputError):
    """A nest or a move that breaks one of the rules; `rule` is its number, `reason` what breaks it."""

    def __init__(self, rule: int, reason: str) -> None:
        super().__init__(f"Rule {rule} ({RULES[rule]}): {reason}")
        self.rule, self.reason = rule, reason
