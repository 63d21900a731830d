"""Train a network, attack it, draw the result (figure 7; 1 min; MNIST or a sample).

100 test digits that FC100-100-10 gets right are attacked with both attacks, each towards a fixed
other class. For comparison, Gaussian noise of the same size is added to them.

Expected: every attack succeeds, with a mean distortion of 0.06 to 0.07; noise of that size changes
hardly any predictions.
"""

import jax
import numpy as np
from matplotlib.figure import Figure

from advjax import attacks, metrics, models, plots, runner
from experiments.common import markdown, networks
from experiments.common.measure import Arrays, Content, Row
from experiments.common.options import DigitOptions, Digits
from experiments.common.victims import victims

NETWORK = "FC100-100-10"
SHOWN = 8
ATTACKS = (attacks.lbfgs, attacks.minimum_norm)


class Options(DigitOptions):
    """Trains FC100-100-10, attacks 100 digits that it gets right, and draws some."""

    TRIAL_STEPS = 500


def measure(options: Options, digits: Digits, seed: int) -> Row:
    """Measure the errors of the network, and run each attack."""
    train, test = digits
    net_key, noise_key = jax.random.split(jax.random.key(seed))
    network = networks.load_or_train(net_key, NETWORK, train, steps=options.steps)
    parameters = options.out / "quickstart.safetensors"
    models.save(parameters, network.params, metadata={"net": NETWORK, "data": train.source})
    print(f"The parameters are in {parameters}", flush=True)
    chosen = victims(network, test, 32 if options.quick else 100)
    images, labels, targets = chosen.images, chosen.labels, chosen.targets
    rows = []
    for make in ATTACKS:
        name = make.__name__
        result = runner.attack_images(make(network.logits_fn), images, targets, progress=name)
        size = result.distortion[:, None, None, None]
        noisy = images + size * np.asarray(jax.random.normal(noise_key, images.shape))
        rows.append(
            {
                "attack": name,
                "success": float(result.success.mean()),
                "mean_distortion": float(result.distortion.mean()),
                "median_distortion": float(np.median(result.distortion)),
                "evaluations": float(result.num_evals.mean()),
                "noise_error": metrics.error_rate(network.logits_fn, noisy, labels),
            }
        )
    return {
        "train_error": metrics.error_rate(network.logits_fn, train.images, train.labels),
        "test_error": metrics.error_rate(network.logits_fn, test.images, test.labels),
        "images": len(images),
        "rows": rows,
        "clean": images[:SHOWN],
        "adversarial": result.x_adv[:SHOWN],
        "labels": labels[:SHOWN],
        "predictions": result.prediction[:SHOWN],
    }


def describe(content: Content) -> str:
    """The errors, and a line for each attack; distortions are RMS per pixel."""
    (run,) = content["runs"]
    return f"""\
{NETWORK} gets {markdown.percent(run["train_error"])} of the training images wrong and
{markdown.percent(run["test_error"])} of the test images. {run["images"]} test images that it gets
right, each towards another class:

{table(run["rows"])}

![8 digits, the difference magnified, and the adversarial images](quickstart.png)"""


def draw(content: Content, arrays: Arrays) -> dict[str, Figure]:
    """Some digits, the differences, and the images that `minimum_norm` found."""
    del content
    figure = plots.adversarial_grid(
        arrays["clean"],
        arrays["adversarial"],
        labels=arrays["labels"],
        predictions=arrays["predictions"],
    )
    return {"quickstart.png": figure}


def table(rows: list[Row]) -> str:
    """A line for each attack."""
    return markdown.table(
        [
            ("attack", row["attack"]),
            ("success", markdown.percent(row["success"])),
            ("mean distortion", f"{row['mean_distortion']:.5f}"),
            ("median", f"{row['median_distortion']:.5f}"),
            ("evaluations", f"{row['evaluations']:.1f}"),
            ("error under noise of that RMS", markdown.percent(row["noise_error"])),
        ]
        for row in rows
    )
