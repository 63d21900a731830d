"""Adversarial digits beside noisy ones (figure 7; 5 min; MNIST or a sample).

(a) FC10 and (b) FC200-200-10, distorted by the paper's attack for each; (c) Gaussian noise of
stddev 1. The paper does not tell which lambda FC10 has (its stddev of 0.06 is that of 1e-4 in
Table 1), nor which net is right about 51 % of the noisy images, nor whether they are cut to [0, 1].
So all test images are shown to the six nets of Table 1, cut and as they are. Each seed trains the
nets anew and draws other noise, and other digits and target classes for (a) and (b); the figure is
of the first one. What lies outside [0, 1] is drawn as black or white.
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

NETS = tuple(paper.TABLE1)
PANELS = {"FC10(1e-4)": "a", "FC200-200-10": "b"}
NOISE = 1.0
KINDS = {"test": "no noise", "noisy": "noise", "noisy_cut": "noise, cut"}
PRINTED = paper.FIGURE7_GAUSSIAN_ACCURACY / 100


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(DigitOptions):
    """Draws Figure 7, and measures how many noisy images the nets of Table 1 get right."""

    images: int = 12
    """How many test images to distort for (a) and (b), and to draw."""
    seeds: int = 5
    TRIAL = trial(seeds=2)


def measure(options: Options, digits: Digits, seed: int) -> Row:
    """How many images each net gets right: as they are, noisy, and distorted for it."""
    key, test = jax.random.key(seed), digits.test
    chosen = random_victims(key, test, options.images)
    noise = jax.random.normal(jax.random.fold_in(key, 4), test.images.shape)
    noisy = test.images + NOISE * np.asarray(noise)
    shown = {"test": test.images, "noisy": noisy, "noisy_cut": noisy.clip(0, 1)}
    rows: list[Row] = []
    distorted = {}
    for name in PANELS if options.quick else NETS:
        net = networks.load_or_train(key, name, digits.train, steps=options.steps)
        row: Row = {
            "net": name,
            "right": {kind: _right(net, xs, test.labels) for kind, xs in shown.items()},
        }
        if name in PANELS:
            result = attack_victims(attacks.lbfgs(net.logits_fn), chosen, name)
            distorted[name] = result.x_adv
            row["adversarial"] = {
                "right": _right(net, result.x_adv, chosen.labels),
                "distortion": float(result.distortion.mean()),
            }
        rows.append(row)
    drawn = {"clean": chosen.images, "noise": noisy[chosen.indices], **distorted}
    return {"images": len(test.labels), "rows": rows, **drawn}


def _right(
    net: networks.Network, xs: Float[Array | np.ndarray, "n *shape"], labels: Int[np.ndarray, " n"]
) -> int:
    """How many images a net gets right."""
    return round(len(labels) * (1 - metrics.error_rate(net.logits_fn, xs, labels)))


def describe(content: Content) -> str:
    """The figure, what the nets make of its first two panels, and of noise."""
    images = content["config"]["images"]

    def right(rows: list[Row]) -> str:
        return _percent(statistics.fraction([row["right"] for row in rows], [images] * len(rows)))

    adversarial = markdown.table(
        [
            ("net", name),
            ("panel", f"({PANELS[name]})"),
            (f"distortion, {images} images", markdown.number(statistics.over(rows, "distortion"))),
            ("right", right(rows)),
        ]
        for name, rows in _adversarial(content)
    )
    noisy = markdown.table(
        [
            ("net", name),
            *(
                (f"{KINDS[kind]}, %", _percent(share) + _mark(kind, share))
                for kind, share in _shares(rows, content).items()
            ),
        ]
        for name, rows in grouped(content, "net").items()
    )
    return f"""\
![Digits and their distortions: adversarial for two nets, and by noise](figure7.png)

Odd columns: test digits; even columns: distorted.

{adversarial}

Percent of all test images that the nets get right: as they are, under Gaussian noise of stddev
{NOISE:g}, and with that cut to [0, 1]. The paper prints {markdown.percent(PRINTED, 0)}, of a net
that it does not name; ✓ marks where that could be a share of 256 of ours.

{noisy}"""


def draw(content: Content, arrays: Arrays) -> dict[str, Figure]:
    """Each panel: test digits, each beside its distortion."""
    captions = {
        name: f"({PANELS[name]}) for {name}\nRMS {rows[0]['distortion']:.3f}"
        for name, rows in _adversarial(content)
    }
    captions["noise"] = f"(c) Gaussian noise\nstddev {NOISE:g}"
    panels = [(caption, arrays["clean"], arrays[name]) for name, caption in captions.items()]
    return {"figure7.png": plots.distorted_pairs(panels)}


def claims(content: Content) -> list[Claim]:
    """Noise that hides the digits does less harm than the attack; and the printed number."""
    attacked = {
        name: sum(row["right"] for row in rows) / (len(rows) * content["config"]["images"])
        for name, rows in _adversarial(content)
    }
    shares = {name: _shares(rows, content) for name, rows in grouped(content, "net").items()}
    noisy = {
        (name, kind): share
        for name, kinds in shares.items()
        for kind, share in kinds.items()
        if kind != "test"
    }
    less = all(attacked[name] < noisy[name, "noisy"].low for name in attacked)
    near = [
        f"{name} ({KINDS[kind]}: {markdown.percent(share.mean, 1)})"
        for (name, kind), share in noisy.items()
        if statistics.agrees(share, PRINTED)
    ]
    means = [100 * share.mean for share in noisy.values()]
    return [
        Claim(
            "A net reads noisy images that people can hardly read, but none that was distorted "
            "for it, hardly visibly",
            f"{markdown.percent(PRINTED, 0)} under noise of stddev 1, 0 % of the adversarial ones",
            ", ".join(
                f"{name}: {markdown.percent(noisy[name, 'noisy'].mean, 1)} against "
                f"{markdown.percent(share, 1)}"
                for name, share in attacked.items()
            ),
            "holds" if less else "does not hold",
        ),
        Claim(
            "Under Gaussian noise of stddev 1 a net is right about half of the images",
            f"{markdown.percent(PRINTED, 0)}, of a net that is not named",
            f"{min(means):.0f} to {max(means):.0f} %, by net and by whether the images are cut to "
            f"[0, 1]; near it {', '.join(near) or 'none'}",
            "holds" if near else "does not hold",
        ),
    ]


def _adversarial(content: Content) -> Iterator[tuple[str, list[Row]]]:
    for name, rows in grouped(content, "net").items():
        if name in PANELS:
            yield name, [row["adversarial"] for row in rows]


def _shares(rows: list[Row], content: Content) -> dict[str, statistics.Estimate]:
    """The share of the test images that a net gets right, by what was done to them."""
    totals = [run["images"] for run in content["runs"]]
    return {
        kind: statistics.fraction([row["right"][kind] for row in rows], totals) for kind in KINDS
    }


def _percent(fraction: statistics.Estimate) -> str:
    return markdown.percent(fraction, 1, unit="")


def _mark(kind: str, share: statistics.Estimate) -> str:
    if kind == "test":
        return ""
    return " ✓" if statistics.agrees(share, PRINTED) else " ✗"
