"""Nets trained on disjoint halves of the images (table 3; 6 min; MNIST or a sample).

The halves P1 and P2 are drawn anew for each seed. Two nets of different shape are trained on P1,
and the shape of the first one again on P2 (the prime), from other initial parameters. Distortions
are those of test images towards random other classes. The paper does not tell which images its
distortions are of; a secondary note says test images.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from advjax import data, metrics
from experiments.common import measure as results
from experiments.common import networks, paper
from experiments.table1 import ATTACKS

NETS = tuple(paper.TABLE3)
ERRORS = ("error_p1", "error_p2", "test_error")


def main(
    *,
    images: int = 1000,
    seeds: int = 5,
    dataset: results.Name = "mnist",
    source: results.Source = "auto",
    out: Path = Path("results"),
    quick: bool = False,
    reuse: bool = False,
) -> dict[str, Any]:
    """Trains the nets of Table 3 and measures their errors and distortions.

    Args:
        images: How many test images to attack for each seed.
        seeds: How many times to divide, to train and to draw.
        dataset: The data set.
        source: Where it comes from: tensorflow-datasets, the sample of MNIST inside the package, or
            the first of both that can be had.
        out: The folder for the numbers.
        quick: Briefly trained nets and two seeds, on the sample: a minute, for a trial.
        reuse: Whether to take the numbers in `out`, if they are of the same options.
    """
    train, test = results.load(dataset, source, quick=quick)
    images, seeds = (32, 2) if quick else (images, seeds)

    def measure(seed: int) -> results.Row:
        chosen = networks.random_victims(jax.random.key(seed), test, images)
        halves = divide(seed, train)
        rows = []
        for name, net in train_on_halves(seed, halves, quick=quick).items():
            errors = {
                of: metrics.error_rate(net.logits_fn, split.images, split.labels)
                for of, split in zip(ERRORS, (*halves, test), strict=True)
            }
            found = {attack.__name__: _distortion(attack, net, chosen) for attack in ATTACKS}
            rows.append({"net": name, **errors, "distortion": found})
        return {"rows": rows}

    content = results.measure(
        "table3",
        measure,
        seeds=seeds,
        config={"images": images, "dataset": dataset, "quick": quick},
        splits=(train, test),
        out=out,
        reuse=reuse,
    )
    results.show("table3", describe(content), out)
    return content


def divide(seed: int, train: data.Dataset) -> tuple[data.Dataset, data.Dataset]:
    """The halves P1 and P2 of a seed."""
    order = jax.random.permutation(jax.random.fold_in(jax.random.key(seed), 3), len(train.labels))
    p1, p2 = (
        data.Dataset(train.images[half], train.labels[half], train.source)
        for half in np.split(np.asarray(order), [len(order) // 2])
    )
    return p1, p2


def train_on_halves(
    seed: int, halves: tuple[data.Dataset, data.Dataset], *, quick: bool
) -> Mapping[str, networks.Net]:
    """The nets of Tables 3 and 4, by the paper's names; a prime's is trained on P2."""
    trained = {}
    for name in NETS:
        prime = name.endswith("'")
        half = halves[prime]
        key = jax.random.key(seed)
        net = networks.load_or_train(
            name.removesuffix("'"),
            half.images,
            half.labels,
            key=jax.random.fold_in(key, 1) if prime else key,
            steps=300 if quick else None,
        )
        trained[name] = net._replace(name=name)
    return trained


def _distortion(attack: Any, net: networks.Net, chosen: networks.Victims) -> list[float]:
    """The mean over all images, and over the first 256."""
    result = networks.attack_victims(attack, net, chosen)
    few = result.distortion[: results.PAPER_IMAGES]
    return [float(result.distortion.mean()), float(few.mean())]


def describe(content: dict[str, Any]) -> str:
    """Errors and distortions, each with the 95 % interval over the seeds."""
    lines = []
    for rows in results.over_seeds(content):
        printed = paper.TABLE3[rows[0]["net"]]
        cells = [rows[0]["net"]]
        for of in ERRORS:
            error = results.mean([100 * row[of] for row in rows])
            cells.append(f"{results.number(error, 2)} ({getattr(printed, of):g})")
        for attack in ATTACKS:
            every, few = zip(*(row["distortion"][attack.__name__] for row in rows), strict=True)
            mark = "✓" if results.predicts(few, printed.distortion) else "✗"
            cells += [
                results.number(results.mean(every)),
                f"{results.number(results.mean(few))} ({printed.distortion:g} {mark})",
            ]
        lines.append(cells)
    header = ["net (the paper's numbers)", "error on P1, %", "on P2, %", "on the test set, %"]
    for attack in ATTACKS:
        header += [f"distortion, `{attack.__name__}`", "of the first 256"]
    return results.table(header, lines)


def claims(content: dict[str, Any]) -> list[results.Claim]:
    """None: what the paper concludes from these nets is in Table 4."""
    del content
    return []
