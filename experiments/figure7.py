"""Adversarial digits beside noisy ones (figure 7; 5 min; MNIST or a sample).

(a) FC10 and (b) FC200-200-10, distorted by the paper's attack for each; (c) Gaussian noise of
stddev 1. The paper does not tell which lambda FC10 has (its stddev of 0.06 is that of 1e-4 in
Table 1), nor which net is right about 51 % of the noisy images, nor whether they are cut to [0, 1].
So all test images are shown to the six nets of Table 1, cut and as they are. Each seed trains the
nets anew and draws other noise, and other digits and target classes for (a) and (b); the figure is
of the first one. What lies outside [0, 1] is drawn as black or white.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from advjax import attacks, metrics, plots
from experiments.common import measure as results
from experiments.common import networks, paper

NETS = tuple(paper.TABLE1)
PANELS = {"FC10(1e-4)": "a", "FC200-200-10": "b"}
NOISE = 1.0
KINDS = {"test": "no noise", "noisy": "noise", "noisy_cut": "noise, cut"}
PRINTED = paper.FIGURE7_GAUSSIAN_ACCURACY / 100


def main(
    *,
    images: int = 12,
    seeds: int = 5,
    dataset: results.Name = "mnist",
    source: results.Source = "auto",
    out: Path = Path("results"),
    quick: bool = False,
    reuse: bool = False,
) -> dict[str, Any]:
    """Draws Figure 7, and measures how many noisy images the nets of Table 1 get right.

    Args:
        images: How many test images to distort for (a) and (b), and to draw.
        seeds: How many times to train and to draw.
        dataset: The data set.
        source: Where it comes from: tensorflow-datasets, the sample of MNIST inside the package, or
            the first of both that can be had.
        out: The folder for the figure and the numbers.
        quick: Two nets, briefly trained, and two seeds, on the sample: half a minute, for a trial.
        reuse: Whether to take the numbers in `out`, if they are of the same options.
    """
    train, test = results.load(dataset, source, quick=quick)
    seeds = 2 if quick else seeds

    def measure(seed: int) -> results.Row:
        key = jax.random.key(seed)
        chosen = networks.random_victims(key, test, images)
        noise = jax.random.normal(jax.random.fold_in(key, 4), test.images.shape)
        noisy = test.images + NOISE * np.asarray(noise)
        shown = {"test": test.images, "noisy": noisy, "noisy_cut": noisy.clip(0, 1)}
        rows: list[results.Row] = []
        panels = []
        for name in PANELS if quick else NETS:
            net = networks.load_or_train(
                name, train.images, train.labels, key=key, steps=300 if quick else None
            )
            row: results.Row = {
                "net": name,
                "right": {kind: _right(net, xs, test.labels) for kind, xs in shown.items()},
            }
            if name in PANELS:
                result = networks.attack_victims(attacks.lbfgs, net, chosen)
                row["adversarial"] = {
                    "right": _right(net, result.x_adv, chosen.labels),
                    "distortion": float(result.distortion.mean()),
                }
                caption = f"({PANELS[name]}) for {name}\nRMS {result.distortion.mean():.3f}"
                panels.append((caption, chosen.images, result.x_adv))
            rows.append(row)
        if seed == 0:
            caption = f"(c) Gaussian noise\nstddev {NOISE:g}"
            panels.append((caption, chosen.images, noisy[chosen.indices]))
            plots.distorted_pairs(panels).savefig(out / "figure7.png")
        return {"images": len(test.labels), "rows": rows}

    content = results.measure(
        "figure7",
        measure,
        seeds=seeds,
        config={"images": images, "dataset": dataset, "quick": quick},
        splits=(train, test),
        out=out,
        reuse=reuse,
    )
    results.show("figure7", describe(content), out)
    return content


def _right(
    net: networks.Net, xs: Float[Array | np.ndarray, "n *shape"], labels: Int[np.ndarray, " n"]
) -> int:
    """How many images a net gets right."""
    return round(len(labels) * (1 - metrics.error_rate(net.logits_fn, xs, labels)))


def describe(content: dict[str, Any]) -> str:
    """The figure, what the nets make of its first two panels, and of noise."""
    images = content["config"]["images"]
    adversarial = results.table(
        ("net", "panel", f"distortion, {images} images", "right"),
        (
            (
                name,
                f"({PANELS[name]})",
                results.number(results.mean([row["distortion"] for row in rows])),
                _percent(results.share([row["right"] for row in rows], [images] * len(rows))),
            )
            for name, rows in _adversarial(content)
        ),
    )
    noisy = results.table(
        ("net", *(f"{kind}, %" for kind in KINDS.values())),
        (
            (
                name,
                *(
                    _percent(share) + _mark(kind, share)
                    for kind, share in _shares(rows, content).items()
                ),
            )
            for name, rows in _by_net(content)
        ),
    )
    return f"""\
![Digits and their distortions: adversarial for two nets, and by noise](figure7.png)

Odd columns: test digits; even columns: distorted.

{adversarial}

Percent of all test images that the nets get right: as they are, under Gaussian noise of stddev
{NOISE:g}, and with that cut to [0, 1]. The paper prints {results.percent(PRINTED, 0)}, of a net
that it does not name; ✓ marks where that could be a share of 256 of ours.

{noisy}"""


def claims(content: dict[str, Any]) -> list[results.Claim]:
    """Noise that hides the digits does less harm than the attack; and the printed number."""
    attacked = {
        name: sum(row["right"] for row in rows) / (len(rows) * content["config"]["images"])
        for name, rows in _adversarial(content)
    }
    shares = {name: _shares(rows, content) for name, rows in _by_net(content)}
    noisy = {
        (name, kind): share
        for name, kinds in shares.items()
        for kind, share in kinds.items()
        if kind != "test"
    }
    less = all(attacked[name] < noisy[name, "noisy"].low for name in attacked)
    near = [
        f"{name} ({KINDS[kind]}: {results.percent(share.mean, 1)})"
        for (name, kind), share in noisy.items()
        if results.agrees(share, PRINTED)
    ]
    means = [100 * share.mean for share in noisy.values()]
    return [
        results.Claim(
            "A net reads noisy images that people can hardly read, but none that was distorted "
            "for it, hardly visibly",
            f"{results.percent(PRINTED, 0)} under noise of stddev 1, 0 % of the adversarial ones",
            ", ".join(
                f"{name}: {results.percent(noisy[name, 'noisy'].mean, 1)} against "
                f"{results.percent(share, 1)}"
                for name, share in attacked.items()
            ),
            "holds" if less else "does not hold",
        ),
        results.Claim(
            "Under Gaussian noise of stddev 1 a net is right about half of the images",
            f"{results.percent(PRINTED, 0)}, of a net that is not named",
            f"{min(means):.0f} to {max(means):.0f} %, by net and by whether the images are cut to "
            f"[0, 1]; near it {', '.join(near) or 'none'}",
            "holds" if near else "does not hold",
        ),
    ]


def _by_net(content: dict[str, Any]) -> Iterator[tuple[str, list[results.Row]]]:
    """For each net its rows of all seeds."""
    for rows in results.over_seeds(content):
        yield rows[0]["net"], list(rows)


def _adversarial(content: dict[str, Any]) -> Iterator[tuple[str, list[results.Row]]]:
    for name, rows in _by_net(content):
        if name in PANELS:
            yield name, [row["adversarial"] for row in rows]


def _shares(rows: list[results.Row], content: dict[str, Any]) -> dict[str, results.Estimate]:
    """The share of the test images that a net gets right, by what was done to them."""
    totals = [run["images"] for run in content["runs"]]
    return {kind: results.share([row["right"][kind] for row in rows], totals) for kind in KINDS}


def _percent(share: results.Estimate) -> str:
    return results.number(results.Estimate(*(100 * end for end in share)), 1)


def _mark(kind: str, share: results.Estimate) -> str:
    if kind == "test":
        return ""
    return " ✓" if results.agrees(share, PRINTED) else " ✗"
