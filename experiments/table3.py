"""Networks trained on disjoint halves (table 3; 6 min; MNIST or a sample).

Each seed draws new halves P1 and P2. Two networks of different architectures are trained on P1, and
the first architecture again on P2 (marked by a prime), from other initial parameters. Distortions
are those of test images towards random other classes. The paper does not say which images its
distortions refer to; a secondary note says test images.
"""

from collections.abc import Iterator, Sequence

import jax

from advjax import attacks, metrics
from experiments.common import markdown, paper, statistics
from experiments.common.claims import Claim
from experiments.common.halves import divide, train_on_halves
from experiments.common.measure import Content, Row, grouped
from experiments.common.options import Digits, VictimOptions
from experiments.common.victims import ATTACKS, Victims, attack_victims, random_victims

ERRORS = {"error_p1": "error on P1", "error_p2": "on P2", "test_error": "on the test set"}


class Options(VictimOptions):
    """Trains the networks of Table 3 and measures their errors and distortions."""


def measure(options: Options, digits: Digits, seed: int) -> Row:
    """Measure the errors and the minimum distortions of each network."""
    chosen = random_victims(jax.random.key(seed), digits.test, options.images)
    halves = divide(seed, digits.train)
    rows = []
    for name, network in train_on_halves(seed, halves, steps=options.steps).items():
        errors = {
            of: metrics.error_rate(network.logits_fn, split.images, split.labels)
            for of, split in zip(ERRORS, (*halves, digits.test), strict=True)
        }
        found = {
            make.__name__: _distortion(make(network.logits_fn), chosen, name) for make in ATTACKS
        }
        rows.append({"net": name, **errors, "distortion": found})
    return {"rows": rows}


def _distortion(attack: attacks.Attack, chosen: Victims, name: str) -> list[float]:
    """The mean over all images, and over the first 256."""
    result = attack_victims(attack, chosen, name)
    few = result.distortion[: statistics.PAPER_IMAGES]
    return [float(result.distortion.mean()), float(few.mean())]


def describe(content: Content) -> str:
    """Errors and distortions, each with the 95 % interval over the seeds."""
    return markdown.table(_cells(name, rows) for name, rows in grouped(content, "net").items())


def _cells(name: str, rows: Sequence[Row]) -> Iterator[tuple[str, str]]:
    printed = paper.TABLE3[name]
    yield "network (the paper's numbers)", name
    for of, heading in ERRORS.items():
        error = markdown.number(statistics.over(rows, of, scale=100), 2)
        yield f"{heading}, %", f"{error} ({getattr(printed, of):g})"
    for attack in ATTACKS:
        every, few = zip(*(row["distortion"][attack.__name__] for row in rows), strict=True)
        mark = "✓" if statistics.predicts(few, printed.distortion) else "✗"
        yield f"distortion, `{attack.__name__}`", markdown.number(statistics.mean(every))
        few_text = markdown.number(statistics.mean(few))
        yield "of the first 256", f"{few_text} ({printed.distortion:g} {mark})"


def claims(content: Content) -> list[Claim]:
    """None: the paper draws its conclusions from these networks in Table 4."""
    del content
    return []
