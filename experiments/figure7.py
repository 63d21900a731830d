"""Adversarial digits beside noisy ones (figure 7; 1 min; MNIST or a sample).

(a) FC10 and (b) FC200-200-10, distorted by the paper's attack for each; (c) Gaussian noise of
stddev 1. The paper does not tell which lambda FC10 has (its stddev of 0.06 is that of 1e-4 in
Table 1), nor which net is right about 51 % of the noisy images, nor whether they are cut to [0, 1];
here they are not, except to draw them.

Expected: the nets read none of the images distorted for them, and far more of the noisy ones, which
people can hardly read.
"""

import functools
from pathlib import Path

import jax
import numpy as np

from advjax import attacks, metrics, plots, runner
from experiments import nets, paper, report

NETS = ("FC10(1e-4)", "FC200-200-10")
NOISE = 1.0


def main(
    *,
    images: int = 12,
    seed: int = 0,
    source: report.Source = "auto",
    out: Path = Path("results"),
    quick: bool = False,
) -> None:
    """Draws Figure 7, and prints how many images the nets get right.

    Args:
        images: How many randomly chosen test digits to draw.
        seed: Of the nets, the choice of digits, the targets and the noise.
        source: The digits: the full MNIST of tensorflow-datasets, the sample inside the package,
            or the first of both that can be had.
        out: The folder for the figure and the numbers.
        quick: Fewer steps, on the sample: seconds, for a trial.
    """
    train, test = report.mnist("embedded" if quick else source)
    net_key, key = jax.random.split(jax.random.key(seed))
    choice_key, target_key, noise_key = jax.random.split(key, 3)
    chosen = jax.random.choice(choice_key, len(test.labels), (images,), replace=False)
    xs, labels = test.images[chosen], test.labels[chosen]
    targets = (labels + np.asarray(jax.random.randint(target_key, labels.shape, 1, 10))) % 10
    noisy = test.images + NOISE * np.asarray(jax.random.normal(noise_key, test.images.shape))

    rows: list[report.Row] = []
    panels = []
    for letter, name in zip("ab", NETS, strict=True):
        net = nets.load_or_train(
            name, train.images, train.labels, key=net_key, steps=300 if quick else None
        )
        attack = functools.partial(attacks.lbfgs, net.logits_fn)
        result = runner.attack_images(attack, xs, targets, progress=f"{name}: lbfgs")
        row: report.Row = {
            "net": name,
            "distortion": float(result.distortion.mean()),
            "right": {
                kind: 1 - metrics.error_rate(net.logits_fn, distorted, truth)
                for kind, distorted, truth in (
                    ("test", test.images, test.labels),
                    ("adversarial", result.x_adv, labels),
                    ("noisy", noisy, test.labels),
                )
            },
        }
        rows.append(row)
        caption = f"RMS {row['distortion']:.3f}, {row['right']['adversarial']:.0%} right"
        panels.append((f"({letter}) for {name}\n{caption}", xs, result.x_adv))
    caption = "nets (a), (b): " + ", ".join(f"{row['right']['noisy']:.0%}" for row in rows)
    panels.append((f"(c) Gaussian noise of RMS {NOISE:g}\n{caption} right", xs, noisy[chosen]))

    print("\nRight on test images, on those shown after an attack, and on all under Gaussian noise")
    print(f"of stddev {NOISE:g}:\n")
    print(table(rows))
    print(f"\nThe paper, under that noise: {paper.FIGURE7_GAUSSIAN_ACCURACY:g} %.")

    out.mkdir(parents=True, exist_ok=True)
    figure, numbers = out / "figure7.png", out / "figure7.json"
    plots.distorted_pairs(panels).savefig(figure)
    report.save_json(
        numbers,
        {
            "experiment": "figure7",
            "data": train.source,
            "seed": seed,
            "images": images,
            "rows": rows,
            "paper": {"noisy": paper.FIGURE7_GAUSSIAN_ACCURACY / 100},
        },
    )
    print()
    print(
        report.saved(
            {
                figure: "odd columns: test digits; even columns: distorted",
                numbers: "the numbers above",
            }
        )
    )


def table(rows: list[report.Row]) -> str:
    """The rows as text; distortion is the RMS per pixel."""
    return report.table(
        ("net", "test images", "adversarial", "(mean distortion)", "noisy"),
        (
            (
                row["net"],
                report.percent(row["right"]["test"]),
                report.percent(row["right"]["adversarial"]),
                f"({row['distortion']:.4f})",
                report.percent(row["right"]["noisy"]),
            )
            for row in rows
        ),
    )
