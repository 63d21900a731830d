"""Attacks many images, and resumes if stopped (no figure; 1 min; MNIST or a sample).

The images that the net gets right are attacked with both attacks, each towards a fixed other class,
on all devices. Finished images are kept in the folder as they come, so that the same command goes
on after a kill, and ends in what it would have come to without.
"""

import functools
from pathlib import Path

import jax
import numpy as np

from advjax import attacks, runner
from experiments.common import measure as results
from experiments.common import networks

ATTACKS = (attacks.minimum_norm, attacks.lbfgs)


def main(
    *,
    net: str = "FC100-100-10",
    images: int = 2000,
    seed: int = 0,
    source: results.Source = "auto",
    out: Path = Path("results/attack"),
    quick: bool = False,
) -> None:
    """Attacks test images of one net, durably.

    Args:
        net: The net to attack, by the paper's name.
        images: How many test images.
        seed: Of the net.
        source: The digits: the full MNIST of tensorflow-datasets, the sample inside the package,
            or the first of both that can be had.
        out: The folder for the results, and for what is finished until then.
        quick: Fewer steps and digits, of the sample: seconds, for a trial.
    """
    train, test = results.load("mnist", source, quick=quick)
    victim = networks.load_or_train(
        net, train.images, train.labels, key=jax.random.key(seed), steps=300 if quick else None
    )
    chosen = networks.victims(victim, test, 64 if quick else images)

    rows, files = [], {}
    for attack in ATTACKS:
        name = attack.__name__
        result = runner.attack_images(
            functools.partial(attack, victim.logits_fn),
            chosen.images,
            chosen.targets,
            directory=out / name,
            progress=name,
        )
        files[out / f"{name}.npz"] = "an AttackResult, and the indices and targets of the images"
        np.savez(
            out / f"{name}.npz",
            test_images=chosen.indices,
            targets=chosen.targets,
            **result._asdict(),
        )
        rows.append(
            (
                name,
                results.percent(float(result.success.mean())),
                f"{result.distortion.mean():.5f}",
                f"{result.num_evals.mean():.1f}",
            )
        )
    print(f"\n{net}, {len(chosen.images)} test images that it gets right:\n")
    print(results.table(("attack", "success", "mean distortion", "evaluations"), rows))
    print()
    print(results.saved(files))
