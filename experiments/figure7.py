"""Adversarial digits beside noisy ones (figure 7; 5 min; MNIST or a sample).

(a) FC10 and (b) FC200-200-10, each with digits distorted for it by the paper's attack; (c) Gaussian
noise of standard deviation 1. The paper does not say which lambda FC10 has (its distortion of 0.06
is that of 1e-4 in Table 1), which network gets 51 % of the noisy images right, or whether they are
clipped to [0, 1]. So we show all test images to the six networks of Table 1, clipped and unclipped.
Each seed retrains the networks and draws other noise, and other digits and targets for (a) and (b).
The figure shows the first seed; values outside [0, 1] are drawn as black or white.
"""

import dataclasses
from collections.abc import Iterator

import jax
import numpy as np
from jaxtyping import Array, Float, Int
from matplotlib.figure import Figure

from advjax import attacks, metrics, plots
from experiments.common import markdown, networks, paper, statistics
from experiments.common.claims import Claim
from experiments.common.measure import Arrays, Content, Row, grouped
from experiments.common.options import DigitOptions, Digits, trial
from experiments.common.victims import attack_victims, random_victims

NETWORKS = tuple(paper.TABLE1)
PANELS = {"FC10(1e-4)": "a", "FC200-200-10": "b"}
NOISE = 1.0
KINDS = {"test": "no noise", "noisy": "noise", "noisy_cut": "noise, clipped"}
PRINTED = paper.FIGURE7_GAUSSIAN_ACCURACY / 100


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(DigitOptions):
    """Draws Figure 7, and measures how many noisy images the networks of Table 1 get right."""

    images: int = 12
    """How many test images to distort for (a) and (b), and to draw."""
    seeds: int = 5
    TRIAL = trial(seeds=2)


def measure(options: Options, digits: Digits, seed: int) -> Row:
    """Count the images that each network gets right: clean, noisy, and distorted for it."""
    key, test = jax.random.key(seed), digits.test
    chosen = random_victims(key, test, options.images)
    noise = jax.random.normal(jax.random.fold_in(key, 4), test.images.shape)
    noisy = test.images + NOISE * np.asarray(noise)
    shown = {"test": test.images, "noisy": noisy, "noisy_cut": noisy.clip(0, 1)}
    rows: list[Row] = []
    distorted = {}
    for name in PANELS if options.quick else NETWORKS:
        network = networks.load_or_train(key, name, digits.train, steps=options.steps)
        row: Row = {
            "net": name,
            "right": {kind: _right(network, xs, test.labels) for kind, xs in shown.items()},
        }
        if name in PANELS:
            result = attack_victims(attacks.lbfgs(network.logits_fn), chosen, name)
            distorted[name] = result.x_adv
            row["adversarial"] = {
                "right": _right(network, result.x_adv, chosen.labels),
                "distortion": float(result.distortion.mean()),
            }
        rows.append(row)
    drawn = {"clean": chosen.images, "noise": noisy[chosen.indices], **distorted}
    return {"images": len(test.labels), "rows": rows, **drawn}


def _right(
    network: networks.Network,
    xs: Float[Array | np.ndarray, "n *shape"],
    labels: Int[np.ndarray, " n"],
) -> int:
    """Count the images that a network gets right."""
    return round(len(labels) * (1 - metrics.error_rate(network.logits_fn, xs, labels)))


def describe(content: Content) -> str:
    """The figure, and how many images the networks get right, distorted and noisy."""
    images = content["config"]["images"]

    def right(rows: list[Row]) -> str:
        return _percent(statistics.fraction([row["right"] for row in rows], [images] * len(rows)))

    adversarial = markdown.table(
        [
            ("network", name),
            ("panel", f"({PANELS[name]})"),
            (f"distortion, {images} images", markdown.number(statistics.over(rows, "distortion"))),
            ("right", right(rows)),
        ]
        for name, rows in _adversarial(content)
    )
    noisy = markdown.table(
        [
            ("network", name),
            *(
                (f"{KINDS[kind]}, %", _percent(rate) + _mark(kind, rate))
                for kind, rate in _rates(rows, content).items()
            ),
        ]
        for name, rows in grouped(content, "net").items()
    )
    return f"""\
![Digits and their distortions: adversarial for two networks, and by noise](figure7.png)

Odd columns: test digits; even columns: distorted.

{adversarial}

Percent of all test images that the networks get right: clean, under Gaussian noise of standard
deviation {NOISE:g}, and with the noisy images clipped to [0, 1]. The paper prints
{markdown.percent(PRINTED, 0)} for an unnamed network; ✓ marks where its interval, for 256 images,
meets ours.

{noisy}"""


def draw(content: Content, arrays: Arrays) -> dict[str, Figure]:
    """Three panels of test digits, each beside its distortion."""
    captions = {
        name: f"({PANELS[name]}) for {name}\nRMS {rows[0]['distortion']:.3f}"
        for name, rows in _adversarial(content)
    }
    captions["noise"] = f"(c) Gaussian noise\nstandard deviation {NOISE:g}"
    panels = [(caption, arrays["clean"], arrays[name]) for name, caption in captions.items()]
    return {"figure7.png": plots.distorted_pairs(panels)}


def claims(content: Content) -> list[Claim]:
    """Noise that hides the digits does less harm than the attack; and the printed accuracy."""
    attacked = {
        name: sum(row["right"] for row in rows) / (len(rows) * content["config"]["images"])
        for name, rows in _adversarial(content)
    }
    rates = {name: _rates(rows, content) for name, rows in grouped(content, "net").items()}
    noisy = {
        (name, kind): rate
        for name, kinds in rates.items()
        for kind, rate in kinds.items()
        if kind != "test"
    }
    less = all(attacked[name] < noisy[name, "noisy"].low for name in attacked)
    near = [
        f"{name} ({KINDS[kind]}: {markdown.percent(rate.mean, 1)})"
        for (name, kind), rate in noisy.items()
        if statistics.agrees(rate, PRINTED)
    ]
    means = [100 * rate.mean for rate in noisy.values()]
    return [
        Claim(
            "A network recognises noisy images that people can hardly read, but not those that "
            "were distorted for it almost invisibly",
            f"{markdown.percent(PRINTED, 0)} right with noise of standard deviation 1, 0 % when "
            "adversarial",
            ", ".join(
                f"{name}: {markdown.percent(noisy[name, 'noisy'].mean, 1)} against "
                f"{markdown.percent(rate, 1)}"
                for name, rate in attacked.items()
            ),
            "holds" if less else "does not hold",
        ),
        Claim(
            "Under Gaussian noise of standard deviation 1 a network gets half of the images right",
            f"{markdown.percent(PRINTED, 0)}, for an unnamed network",
            f"{min(means):.0f} to {max(means):.0f} %, depending on the network and on clipping to "
            f"[0, 1]; near that: {', '.join(near) or 'none'}",
            "holds" if near else "does not hold",
        ),
    ]


def _adversarial(content: Content) -> Iterator[tuple[str, list[Row]]]:
    for name, rows in grouped(content, "net").items():
        if name in PANELS:
            yield name, [row["adversarial"] for row in rows]


def _rates(rows: list[Row], content: Content) -> dict[str, statistics.Estimate]:
    """The fraction of the test images that a network gets right, for each kind of noise."""
    totals = [run["images"] for run in content["runs"]]
    return {
        kind: statistics.fraction([row["right"][kind] for row in rows], totals) for kind in KINDS
    }


def _percent(fraction: statistics.Estimate) -> str:
    return markdown.percent(fraction, 1, unit="")


def _mark(kind: str, rate: statistics.Estimate) -> str:
    if kind == "test":
        return ""
    return " ✓" if statistics.agrees(rate, PRINTED) else " ✗"
