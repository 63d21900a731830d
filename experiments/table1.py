"""Errors and minimum distortions of six nets (table 1; 20 min; MNIST or a sample).

Each seed trains the nets anew and draws other test images, each with a random other class for a
target; every net is attacked on the same ones, with the paper's attack and with `minimum_norm`.
Images that a net gets wrong to begin with are counted, as they seem to be in the paper. How many
images the paper used, and which targets, it does not tell: its transfer rates are fractions of 256,
so the first 256 of a seed are also shown by themselves, and for them the nearest image of any of
the nine other classes too.

Weight decay is lambda / 2 * sum(w^2), with the printed lambdas for FC10. That reproduces two of its
three pairs of errors; FC10(1) comes out worse than printed, and with the paper's other possible
reading, lambda / 10 * sum(w^2), much better, so what it was trained with remains unknown. The
sigmoid nets take ten times the printed lambdas, which brings them nearest to the printed test
errors. How the autoencoder was trained the paper does not tell; ours errs more.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from advjax import attacks, metrics
from experiments.common import measure as results
from experiments.common import networks, paper

NETS = tuple(paper.TABLE1)
ATTACKS = (attacks.lbfgs, attacks.minimum_norm)


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
    """Trains the nets of Table 1 and measures how far the nearest adversarial images are.

    Args:
        images: How many test images to attack for each seed.
        seeds: How many times to train and to draw.
        dataset: The data set.
        source: Where it comes from: tensorflow-datasets, the sample of MNIST inside the package, or
            the first of both that can be had.
        out: The folder for the numbers.
        quick: Two nets, briefly trained, and two seeds, on the sample: a minute, for a trial.
        reuse: Whether to take the numbers in `out`, if they are of the same options.
    """
    train, test = results.load(dataset, source, quick=quick)
    images, seeds = (32, 2) if quick else (images, seeds)

    def measure(seed: int) -> results.Row:
        chosen = networks.random_victims(jax.random.key(seed), test, images)
        rows = []
        for name in NETS[:4:3] if quick else NETS:
            net = networks.load_or_train(
                name,
                train.images,
                train.labels,
                key=jax.random.key(seed),
                steps=300 if quick else None,
            )
            errors = {
                f"{split}_error": metrics.error_rate(net.logits_fn, *some[:2])
                for split, some in (("train", train), ("test", test))
            }
            found = {attack.__name__: _attack(attack, net, chosen) for attack in ATTACKS}
            rows.append({"net": name, **errors, "attacks": found})
        return {"rows": rows}

    content = results.measure(
        "table1",
        measure,
        seeds=seeds,
        config={"images": images, "dataset": dataset, "quick": quick},
        splits=(train, test),
        out=out,
        reuse=reuse,
    )
    results.show("table1", describe(content), out)
    return content


def _attack(attack: Any, net: networks.Net, chosen: networks.Victims) -> results.Row:
    result = networks.attack_victims(attack, net, chosen)
    few = slice(results.PAPER_IMAGES)
    nearest = networks.attack_every_class(
        attack, net, networks.Victims(*(field[few] for field in chosen))
    )
    return {
        "distortion": float(result.distortion.mean()),
        "distortion_256": float(result.distortion[few].mean()),
        "nearest_256": float(nearest.distortion.mean()),
        "success": float(result.success.mean()),
        "evaluations": float(result.num_evals.mean()),
    }


def describe(content: dict[str, Any]) -> str:
    """Two tables: errors and distortions, each with the 95 % interval over the seeds."""
    errors = results.table(
        ("net", "train error, %", "paper", "test error, %", "paper"),
        (
            (
                name,
                results.number(results.mean([100 * row["train_error"] for row in rows]), 2),
                f"{printed.train_error:g}",
                results.number(results.mean([100 * row["test_error"] for row in rows]), 2),
                f"{printed.test_error:g}",
            )
            for name, rows, printed in _by_net(content)
        ),
    )
    n = content["config"]["images"]
    distortions = results.table(
        (
            "net",
            "attack",
            f"distortion, {n:,} images",
            "of the first 256",
            "paper",
            "to any class",
            "success",
            "gradients",
        ),
        _distortions(content),
        names=2,
    )
    return f"""\
{errors}

Mean minimum distortion (RMS per pixel) towards random classes. ✓ marks where the paper's number is
within the 95 % prediction interval of one more seed's 256 images, ✗ where not.

{distortions}"""


def _distortions(content: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    for name, rows, printed in _by_net(content):
        for attack in ATTACKS:
            found = [row["attacks"][attack.__name__] for row in rows]
            few = [one["distortion_256"] for one in found]
            mark = "✓" if results.predicts(few, printed.distortion) else "✗"
            yield (
                name,
                f"`{attack.__name__}`",
                *(
                    results.number(results.mean(values))
                    for values in ([one["distortion"] for one in found], few)
                ),
                f"{printed.distortion:g} {mark}",
                results.number(results.mean([one["nearest_256"] for one in found])),
                results.percent(float(np.mean([one["success"] for one in found]))),
                f"{np.mean([one['evaluations'] for one in found]):.1f}",
            )


def claims(content: dict[str, Any]) -> list[results.Claim]:
    """Adversarial examples everywhere; decay makes them larger; the attack exact if convex."""
    found = {
        name: {
            attack.__name__: np.array([row["attacks"][attack.__name__] for row in rows])
            for attack in ATTACKS
        }
        for name, rows, _ in _by_net(content)
    }

    def values(name: str, attack: str, what: str) -> list[float]:
        return [one[what] for one in found[name][attack]]

    success = min(min(values(name, attack, "success")) for name in found for attack in found[name])
    largest = max(np.mean(values(name, "lbfgs", "distortion")) for name in found)
    linear = [name for name in found if name.startswith("FC10(")]
    by_decay = [values(name, "lbfgs", "distortion") for name in linear]
    ordered = sum(list(seed) == sorted(seed) for seed in zip(*by_decay, strict=True))
    excess = [
        sum(values(name, "lbfgs", "distortion")) / sum(values(name, "minimum_norm", "distortion"))
        - 1
        for name in linear
    ]
    return [
        results.Claim(
            "Every net has adversarial examples next to nearly every image",
            "every sample tried, mean distortion up to 0.14",
            f"{results.percent(success)} of images in the worst case, mean distortion up to "
            f"{largest:.3f}",
            "holds" if success > 0.99 else "holds in part",
        ),
        results.Claim(
            "More weight decay makes the nearest adversarial example of a linear net further",
            " < ".join(f"{paper.TABLE1[name].distortion:g}" for name in linear),
            " < ".join(f"{np.mean(some):.4f}" for some in by_decay)
            + f", so ordered in {ordered} of {len(content['runs'])} seeds",
            "holds" if ordered == len(content["runs"]) else "does not hold",
        ),
        results.Claim(
            "The penalised attack is exact where the loss is convex",
            "stated",
            "`minimum_norm` finds nearer images of the same classes on the linear nets: `lbfgs` is "
            + ", ".join(f"{results.percent(one, 1)}" for one in excess)
            + " above",
            "does not hold" if max(excess) > 0.005 else "holds",
        ),
    ]


def _by_net(
    content: dict[str, Any],
) -> Iterator[tuple[str, list[results.Row], paper.Table1]]:
    """For each net its rows of all seeds, and the paper's."""
    for rows in results.over_seeds(content):
        yield rows[0]["net"], list(rows), paper.TABLE1[rows[0]["net"]]
