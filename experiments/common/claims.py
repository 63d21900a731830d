"""The paper's claims, and what became of them."""

from collections.abc import Iterable
from typing import Literal, NamedTuple

Verdict = Literal["holds", "holds in part", "does not hold", "cannot be tested here"]


class Claim(NamedTuple):
    """A claim of the paper, its evidence, our evidence, and our verdict."""

    claim: str
    paper: str
    ours: str
    verdict: Verdict


def verdict(parts: Iterable[bool]) -> Verdict:
    """The verdict on a claim of several parts, each of which holds or not."""
    parts = list(parts)
    return "holds" if all(parts) else "holds in part" if any(parts) else "does not hold"
