"""Trains a net, attacks it and draws the result (figure 7; 1 min; MNIST or a sample).

100 test digits that FC100-100-10 gets right are attacked with both attacks, each towards a fixed
other class; beside them stands what Gaussian noise of the same size does to the net.

Expected: every attack succeeds, with a mean distortion of 0.06 to 0.07; noise of that size changes
hardly a prediction.
"""

import functools
from pathlib import Path

import jax
import numpy as np

from advjax import attacks, metrics, models, plots, runner
from experiments.common import measure as results
from experiments.common import networks

NET = "FC100-100-10"
ATTACKS = (attacks.lbfgs, attacks.minimum_norm)


def main(
    *,
    seed: int = 0,
    source: results.Source = "auto",
    out: Path = Path("results"),
    quick: bool = False,
) -> None:
    """Trains FC100-100-10, attacks 100 digits that it gets right, and draws some.

    Args:
        seed: Of the net and of the noise.
        source: The digits: the full MNIST of tensorflow-datasets, the sample inside the package,
            or the first of both that can be had.
        out: The folder for the figure, the net and the numbers.
        quick: Fewer steps and digits, of the sample: seconds, for a trial.
    """
    train, test = results.load("mnist", source, quick=quick)
    net_key, noise_key = jax.random.split(jax.random.key(seed))
    net = networks.load_or_train(
        NET, train.images, train.labels, key=net_key, steps=500 if quick else None
    )
    logits_fn = net.logits_fn
    train_error = metrics.error_rate(logits_fn, train.images, train.labels)
    test_error = metrics.error_rate(logits_fn, test.images, test.labels)
    print(
        f"{NET} gets {results.percent(train_error)} of the training images wrong "
        f"and {results.percent(test_error)} of the test images.\n",
        flush=True,
    )

    chosen = networks.victims(net, test, 32 if quick else 100)
    images, labels, targets = chosen.images, chosen.labels, chosen.targets

    rows, found = [], {}
    for attack in ATTACKS:
        name = attack.__name__
        result = runner.attack_images(
            functools.partial(attack, logits_fn), images, targets, progress=name
        )
        found[name] = result
        size = result.distortion[:, None, None, None]
        noisy = images + size * np.asarray(jax.random.normal(noise_key, images.shape))
        rows.append(
            {
                "attack": name,
                "success": float(result.success.mean()),
                "mean_distortion": float(result.distortion.mean()),
                "median_distortion": float(np.median(result.distortion)),
                "evaluations": float(result.num_evals.mean()),
                "noise_error": metrics.error_rate(logits_fn, noisy, labels),
            }
        )
    print(f"\n{len(images)} test images that the net gets right, each towards another class:\n")
    print(table(rows))

    out.mkdir(parents=True, exist_ok=True)
    figure, params, numbers = (out / f"quickstart.{end}" for end in ("png", "safetensors", "json"))
    shown = found["minimum_norm"]
    plots.adversarial_grid(
        images[:8], shown.x_adv[:8], labels=labels[:8], predictions=shown.prediction[:8]
    ).savefig(figure)
    models.save(params, net.params, metadata={"net": NET, "data": train.source, "seed": str(seed)})
    results.save_json(
        numbers,
        {
            "experiment": "quickstart",
            "data": train.source,
            "seed": seed,
            "net": NET,
            "train_error": train_error,
            "test_error": test_error,
            "images": len(images),
            "rows": rows,
        },
    )
    print()
    print(
        results.saved(
            {
                figure: "8 digits, the difference magnified, and the adversarial images",
                params: "the net's parameters",
                numbers: "the numbers above",
            }
        )
    )


def table(rows: list[results.Row]) -> str:
    """The rows as text; distortion is the RMS per pixel."""
    return results.table(
        (
            "attack",
            "success",
            "mean distortion",
            "median",
            "evaluations",
            "error under noise of that RMS",
        ),
        (
            (
                row["attack"],
                results.percent(row["success"]),
                f"{row['mean_distortion']:.5f}",
                f"{row['median_distortion']:.5f}",
                f"{row['evaluations']:.1f}",
                results.percent(row["noise_error"]),
            )
            for row in rows
        ),
    )
