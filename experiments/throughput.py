"""Refilled lanes against fixed batches (no figure; 1 min; MNIST or a sample).

The same images are attacked in batches of the same size in three ways: under `jax.vmap` on one
device, where a batch waits for its slowest image; in refilled lanes on one device, where the next
image takes the place of a finished one; and in refilled lanes on all devices. Here a CPU has one
device for each core. Compilation is not counted. The last column divides the time by that of the
evaluations alone, as plain batched gradients.

In the numbers, `alone` is the fraction of images that are adversarial for the model as JAX computes
it by default, one image at a time: on an accelerator in a lower precision than the attack's.

Expected on a CPU: refilled lanes about twice as fast as fixed batches, and all devices at 3 to 5
times the time of the gradients; a batch of 64 to 128 is best.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from advjax import attacks, runner
from experiments.common import markdown, networks
from experiments.common.measure import Content, Row
from experiments.common.options import DigitOptions, Digits, trial
from experiments.common.timing import BATCH_SIZE, time_of_a_gradient, timed, vmapped
from experiments.common.victims import victims

ATTACKS = (attacks.minimum_norm, attacks.lbfgs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(DigitOptions):
    """Times both attacks with each batch size, with and without refilling."""

    network: str = "FC100-100-10"
    """The network to attack, by the paper's name."""
    images: int = 2000
    """How many test images."""
    batch_sizes: tuple[int, ...] = (16, 32, 64, 128, 256)
    """The number of lanes on each device."""
    TRIAL = trial(images=64, batch_sizes=(16,))


def measure(options: Options, digits: Digits, seed: int) -> Row:
    """Time each attack with each batch size, in each way."""
    key = jax.random.key(seed)
    victim = networks.load_or_train(key, options.network, digits.train, steps=options.steps)
    chosen = victims(victim, digits.test, options.images)
    xs, targets = chosen.images, chosen.targets
    gradient = time_of_a_gradient(victim.logits_fn, xs[:BATCH_SIZE], targets[:BATCH_SIZE])
    rows: list[Row] = []
    for make in ATTACKS:
        attack = make(victim.logits_fn)
        for batch_size in options.batch_sizes:
            for way, run in (
                ("fixed batches", fixed_batches(attack, batch_size)),
                ("one device", lanes(attack, batch_size, jax.devices()[:1])),
                ("all devices", lanes(attack, batch_size, jax.devices())),
            ):
                result, seconds = timed(run, xs, targets)
                seconds /= len(xs)
                evaluations = float(result.num_evals.mean())
                rows.append(
                    {
                        "attack": make.__name__,
                        "batch_size": batch_size,
                        "way": way,
                        "success": float(result.success.mean()),
                        "alone": survival(victim.logits_fn, result.x_adv, targets),
                        "distortion": float(result.distortion.mean()),
                        "evaluations": evaluations,
                        "milliseconds": 1e3 * seconds,
                        "seconds_over_gradients": seconds / (evaluations * gradient),
                    }
                )
    return {
        "images": len(xs),
        "devices": jax.device_count(),
        "microseconds_a_gradient": 1e6 * gradient,
        "rows": rows,
    }


@jax.jit
def _predict_alone(logits_fn: Callable, xs: np.ndarray) -> jax.Array:
    return jax.lax.map(lambda x: jax.numpy.argmax(logits_fn(x)), xs)


def survival(logits_fn: Callable, xs: np.ndarray, targets: np.ndarray) -> float:
    """The fraction of images that get their target when predicted alone, by JAX's defaults."""
    return float(np.mean(_predict_alone(logits_fn, xs) == targets))


def lanes(
    attack: attacks.Attack, batch_size: int, devices: Sequence[jax.Device]
) -> Callable[[np.ndarray, np.ndarray], attacks.AttackResult]:
    """The runner on some devices, as a function of images and targets."""
    mesh = Mesh(np.asarray(devices), ("images",))
    return functools.partial(runner.attack_images, attack, batch_size=batch_size, mesh=mesh)


def fixed_batches(
    attack: attacks.Attack, batch_size: int
) -> Callable[[np.ndarray, np.ndarray], attacks.AttackResult]:
    """Batches in sequence under `jax.vmap`, the last one padded with the first images."""
    run = vmapped(attack)

    def attack_images(xs: np.ndarray, targets: np.ndarray) -> attacks.AttackResult:
        order = np.resize(np.arange(len(xs)), (-(-len(xs) // batch_size), batch_size))
        found = [jax.device_get(run(xs[batch], targets[batch])) for batch in order]
        return jax.tree.map(lambda *leaves: np.concatenate(leaves)[: len(xs)], *found)

    return attack_images


def describe(content: Content) -> str:
    """A line for each attack and batch size."""
    run = content["runs"][0]
    return f"""\
{content["config"]["network"]}, {run["images"]} test images on {run["devices"]} devices; a batched
gradient takes {run["microseconds_a_gradient"]:.1f} us per image.

{table(run["rows"])}"""


def table(rows: list[Row]) -> str:
    """A line for each attack and batch size."""
    return markdown.table(
        [
            ("attack", one["attack"]),
            ("batch size", str(one["batch_size"])),
            ("fixed, ms/image", f"{fixed['milliseconds']:.2f}"),
            ("refilled", f"{one['milliseconds']:.2f}"),
            ("gain", f"{fixed['milliseconds'] / one['milliseconds']:.1f} x"),
            ("all devices", f"{every['milliseconds']:.2f}"),
            ("/gradients", f"{every['seconds_over_gradients']:.1f} x"),
        ]
        for fixed, one, every in zip(rows[::3], rows[1::3], rows[2::3], strict=True)
    )
