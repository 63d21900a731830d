"""Attack many images, resume if stopped (no figure; 1 min; MNIST or a sample).

The images that the network gets right are attacked with both attacks, each towards a fixed other
class, on all devices. Finished images are saved as they come, so that the same command resumes
after a kill and ends with the results of an uninterrupted run.
"""

import dataclasses
from pathlib import Path

import jax

from advjax import attacks, runner
from experiments.common import markdown, networks
from experiments.common.measure import Content, Row
from experiments.common.options import DigitOptions, Digits, trial
from experiments.common.victims import victims

ATTACKS = (attacks.minimum_norm, attacks.lbfgs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(DigitOptions):
    """Attacks test images of one network; resumes if stopped."""

    out: Path = Path("results/attack")
    network: str = "FC100-100-10"
    """The network to attack, by the paper's name."""
    images: int = 2000
    """How many test images."""
    TRIAL = trial(images=64)


def measure(options: Options, digits: Digits, seed: int) -> Row:
    """Run each attack; keep its result for every image."""
    key = jax.random.key(seed)
    victim = networks.load_or_train(key, options.network, digits.train, steps=options.steps)
    chosen = victims(victim, digits.test, options.images)
    rows, found = [], {"test_images": chosen.indices, "targets": chosen.targets}
    for make in ATTACKS:
        name = make.__name__
        result = runner.attack_images(
            make(victim.logits_fn),
            chosen.images,
            chosen.targets,
            directory=options.out / name,
            progress=name,
        )
        found |= {f"{name}_{field}": values for field, values in result._asdict().items()}
        rows.append(
            {
                "attack": name,
                "success": float(result.success.mean()),
                "distortion": float(result.distortion.mean()),
                "evaluations": float(result.num_evals.mean()),
            }
        )
    return {"images": len(chosen.images), "rows": rows, **found}


def describe(content: Content) -> str:
    """A line for each attack."""
    (run,) = content["runs"]
    rows = markdown.table(
        [
            ("attack", row["attack"]),
            ("success", markdown.percent(row["success"])),
            ("mean distortion", f"{row['distortion']:.5f}"),
            ("evaluations", f"{row['evaluations']:.1f}"),
        ]
        for row in run["rows"]
    )
    return f"""\
{content["config"]["network"]}, {run["images"]} test images that it gets right:

{rows}

attack.npz holds the result of each attack for every image, with its index and target."""
