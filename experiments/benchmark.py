"""Ours against jaxopt and SciPy: evaluations, time (no figure; 1 min; MNIST or sample).

Every attack takes the same images of the same net to the same targets, in one run: both of ours in
one batch; the paper's attack with jaxopt's L-BFGS-B as the solver, guarded, in one batch and one
image at a time; and a SciPy loop that bisects c. Compilation is left out. The last column sets the
time beside that of the evaluations alone, as plain batched gradients: 1 would be a solver that
costs nothing.

Expected: ours at the smallest distortion, in a tenth of SciPy's evaluations, and at least 30 times
faster an image than the SciPy loop and batched jaxopt.
"""

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from advjax import attacks, losses, solvers
from experiments import nets, peers, report


class Outcome(NamedTuple):
    """What one way of attacking came to, for each image."""

    success: np.ndarray
    distortion: np.ndarray
    num_evals: np.ndarray
    seconds: float
    """An image."""


def main(
    *,
    net: str = "FC100-100-10",
    images: int = 100,
    seed: int = 0,
    source: report.Source = "auto",
    out: Path = Path("results"),
    quick: bool = False,
) -> None:
    """Times the attacks on one net, and counts what they take.

    Args:
        net: The net to attack, by the paper's name.
        images: How many test images, all in one batch; the slow ways take the first 20.
        seed: Of the net.
        source: The digits: the full MNIST of tensorflow-datasets, the sample inside the package,
            or the first of both that can be had.
        out: The folder for the numbers.
        quick: Fewer steps and digits, of the sample: seconds, for a trial.
    """
    train, test = report.mnist("embedded" if quick else source)
    victim = nets.load_or_train(
        net, train.images, train.labels, key=jax.random.key(seed), steps=300 if quick else None
    )
    n, few = (8, 2) if quick else (images, min(20, images))
    right = np.flatnonzero(jax.vmap(victim.logits_fn)(test.images).argmax(1) == test.labels)[:n]
    xs, labels = test.images[right], test.labels[right]
    targets = (labels + 1 + np.arange(len(right)) % 9) % 10

    gradient = time_of_a_gradient(victim.logits_fn, xs, targets)
    jaxopt = functools.partial(attacks.lbfgs, solver=solvers.jaxopt_lbfgsb(tol=0))
    ways: dict[str, Callable[[], Outcome]] = {
        "minimum_norm": lambda: batched(attacks.minimum_norm, victim.logits_fn, xs, targets),
        "lbfgs": lambda: batched(attacks.lbfgs, victim.logits_fn, xs, targets),
        "lbfgs, jaxopt": lambda: batched(jaxopt, victim.logits_fn, xs[:few], targets[:few]),
        "lbfgs, jaxopt, one by one": lambda: one_by_one(
            jaxopt, victim.logits_fn, xs[:few], targets[:few]
        ),
        "lbfgs, SciPy loop": lambda: scipy_loop(victim, xs[:few], targets[:few]),
    }
    rows = []
    for name, run in ways.items():
        print(f"{name} ...", flush=True)
        outcome = run()
        rows.append(
            {
                "attack": name,
                "images": len(outcome.distortion),
                "success": float(outcome.success.mean()),
                "distortion_of_the_first": float(outcome.distortion[:few].mean()),
                "evaluations": float(outcome.num_evals.mean()),
                "milliseconds": 1e3 * outcome.seconds,
                "seconds_over_gradients": outcome.seconds / (outcome.num_evals.mean() * gradient),
            }
        )
    fastest = rows[0]["milliseconds"]
    print(
        f"\n{net}, {len(xs)} test images; a gradient in a batch of {len(xs)} takes "
        f"{1e6 * gradient:.1f} us an image. Distortion: mean over the first {few}.\n"
    )
    print(
        report.table(
            ("attack", "success", "distortion", "evaluations", "ms/image", "slower", "/gradients"),
            (
                (
                    row["attack"],
                    report.percent(row["success"]),
                    f"{row['distortion_of_the_first']:.5f}",
                    f"{row['evaluations']:.1f}",
                    f"{row['milliseconds']:.2f}",
                    f"{row['milliseconds'] / fastest:.1f} x",
                    f"{row['seconds_over_gradients']:.1f} x",
                )
                for row in rows
            ),
        )
    )
    out.mkdir(parents=True, exist_ok=True)
    numbers = out / "benchmark.json"
    report.save_json(
        numbers,
        {
            "experiment": "benchmark",
            "data": train.source,
            "net": net,
            "seed": seed,
            "microseconds_a_gradient": 1e6 * gradient,
            "rows": rows,
        },
    )
    print()
    print(report.saved({numbers: "the numbers above"}))


def time_of_a_gradient(
    logits_fn: jax.tree_util.Partial, xs: np.ndarray, targets: np.ndarray, *, repeats: int = 100
) -> float:
    """The seconds an image of value and gradient of the loss in one batch: the best of many."""

    @jax.jit
    def value_and_grad(logits_fn, xs, targets):
        def loss(x, target):
            return losses.cross_entropy(logits_fn(x), target)

        return jax.vmap(jax.value_and_grad(loss))(xs, targets)

    arguments = jax.device_put((logits_fn, xs, targets))
    return min(_seconds(value_and_grad, *arguments) for _ in range(repeats)) / len(xs)


def batched(
    attack: Callable[..., attacks.AttackResult],
    logits_fn: jax.tree_util.Partial,
    xs: np.ndarray,
    targets: np.ndarray,
) -> Outcome:
    """All images at once, under `jax.vmap`; the best of three runs."""
    run = jax.jit(lambda fn, xs, targets: jax.vmap(functools.partial(attack, fn))(xs, targets))
    arguments = jax.device_put((logits_fn, xs, targets))
    result = run(*arguments)
    seconds = min(_seconds(run, *arguments) for _ in range(3))
    return _outcome(result, seconds / len(xs))


def one_by_one(
    attack: Callable[..., attacks.AttackResult],
    logits_fn: jax.tree_util.Partial,
    xs: np.ndarray,
    targets: np.ndarray,
) -> Outcome:
    """One image after the other, in a Python loop."""
    run = jax.jit(attack)
    jax.block_until_ready(run(logits_fn, xs[0], targets[0]))
    start = time.perf_counter()
    results = [
        jax.block_until_ready(run(logits_fn, x, target))
        for x, target in zip(xs, targets, strict=True)
    ]
    seconds = time.perf_counter() - start
    return _outcome(jax.tree.map(lambda *leaves: np.stack(leaves), *results), seconds / len(xs))


def scipy_loop(net: nets.Net, xs: np.ndarray, targets: np.ndarray) -> Outcome:
    """SciPy's L-BFGS-B, one image after the other, in float64, where it needs fewest steps."""
    with jax.enable_x64(True):
        double = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), net.params)
        attack = peers.scipy_lbfgs(functools.partial(net.model.apply, double))
        attack(xs[0], int(targets[0]))
        start = time.perf_counter()
        results = [attack(x, int(target)) for x, target in zip(xs, targets, strict=True)]
        seconds = time.perf_counter() - start
    return Outcome(
        success=np.array([result.success for result in results]),
        distortion=np.array([result.distortion for result in results]),
        num_evals=np.array([result.num_evals for result in results]),
        seconds=seconds / len(xs),
    )


def _outcome(result: attacks.AttackResult, seconds: float) -> Outcome:
    return Outcome(
        success=np.asarray(result.success),
        distortion=np.asarray(result.distortion),
        num_evals=np.asarray(result.num_evals),
        seconds=seconds,
    )


def _seconds(function: Callable[..., Any], *arguments: Any) -> float:
    start = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    return time.perf_counter() - start
