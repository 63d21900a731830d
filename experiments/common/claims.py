"""The paper's claims, and what became of them."""

from collections.abc import Iterable
from typing import Literal, NamedTuple

Verdict = Literal["holds", "holds in part", "does not hold", "cannot be tested here"]


class Claim(NamedTuple):
    """What the paper says, on what evidence, what we found, and what follows."""

    claim: str
    paper: str
    ours: str
    verdict: Verdict


def verdict(borne_out: Iterable[bool]) -> Verdict:
    """The verdict on a claim of several parts, each of which was borne out or not."""
    parts = list(borne_out)
    return "holds" if all(parts) else "holds in part" if any(parts) else "does not hold"
