"""Our attacks against others: gap and time (figure; 2 min; MNIST or a sample).

All methods attack the same images of the same network towards the same targets, in one run: our two
attacks; the paper's attack with jaxopt's L-BFGS-B as the solver, guarded, in one batch and one
image at a time; a SciPy loop that bisects c; and with `--peers`, 20 minutes more, foolbox's
Carlini-Wagner, Brendel-Bethge and DDN. Compilation is not counted.

"In float64" is the fraction of images that are still adversarial when the network is evaluated in
float64; those of Brendel-Bethge lie on the boundary to the last digit of float32. The gap is the
mean excess over the smallest distortion that any attack of the run found for an image. The last
column divides the time by that of the evaluations alone, as plain batched gradients; 1 would be a
solver that costs nothing.

Expected: `minimum_norm` has a gap of hundredths of a percent after some 25 evaluations, where
Carlini-Wagner takes tens of thousands; both of our attacks are at least 10 times as fast as the
rest.
"""

import dataclasses
import functools
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from advjax import attacks, metrics, runner, solvers
from experiments.common import foolbox_peers, markdown, networks
from experiments.common.measure import Arrays, Content, Row
from experiments.common.options import DigitOptions, Digits, trial
from experiments.common.peers import Outcome, Way, scipy_lbfgs
from experiments.common.timing import BATCH_SIZE, time_of_a_gradient, timed, vmapped
from experiments.common.victims import victims

ONE_BY_ONE = "lbfgs, jaxopt, one by one"
# In the figure: the colour, and the position of the label.
_LEFT = {"xytext": (-7, 0), "ha": "right", "va": "center"}
_RIGHT = {"xytext": (7, 0), "ha": "left", "va": "center"}
_ABOVE = {"xytext": (0, 7), "ha": "center", "va": "bottom"}
LOOKS: dict[str, tuple[str, dict[str, Any]]] = {
    "advjax": ("tab:red", _LEFT),
    "jaxopt": ("tab:purple", _ABOVE),
    "SciPy": ("tab:gray", _ABOVE),
    "foolbox": ("tab:blue", _RIGHT),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(DigitOptions):
    """Times the attacks on one network, and counts their evaluations."""

    network: str = "FC100-100-10"
    """The network to attack, by the paper's name."""
    images: int = 2000
    """The number of test images for our attacks; the others get the first 50."""
    peers: bool = False
    """Run foolbox's attacks too."""
    TRIAL = trial(images=8)

    def load(self) -> Digits:
        """Load the digits, once the packages are known to be there."""
        if self.peers:
            foolbox_peers.require("foolbox", "numba")  # foolbox needs numba without declaring it
        return super().load()


def measure(options: Options, digits: Digits, seed: int) -> Row:
    """Run and compare all methods."""
    key = jax.random.key(seed)
    victim = networks.load_or_train(key, options.network, digits.train, steps=options.steps)
    few = 2 if options.quick else min(50, options.images)
    right = victims(victim, digits.test)
    xs, targets = right.images[: options.images], right.targets[: options.images]
    ways = [*our_ways(victim, xs, targets), *slow_ways(victim, xs[:few], targets[:few])]
    if options.peers:
        ways += foolbox_peers.ways(
            victim.logits_fn,
            xs[:few],
            targets[:few],
            starts=right.images,
            max_steps=10 if options.quick else 10_000,
        )
    outcomes = []
    for way in ways:
        print(f"{way.name} ...", flush=True)
        outcomes.append((way, way.run()))
    gradient = time_of_a_gradient(victim.logits_fn, xs[:BATCH_SIZE], targets[:BATCH_SIZE])
    return {
        "images_compared": few,
        "microseconds_a_gradient": 1e6 * gradient,
        "rows": compare(outcomes, victim, xs, targets, gradient=gradient),
    }


# --- the ways of attacking -------------------------------------------------------------------


def our_ways(network: networks.Network, xs: np.ndarray, targets: np.ndarray) -> list[Way]:
    """Both of our attacks."""
    return [
        Way(make.__name__, "advjax", functools.partial(many, make(network.logits_fn), xs, targets))
        for make in (attacks.minimum_norm, attacks.lbfgs)
    ]


def slow_ways(network: networks.Network, xs: np.ndarray, targets: np.ndarray) -> list[Way]:
    """The paper's attack with other solvers."""
    given = attacks.lbfgs(network.logits_fn, solver=solvers.jaxopt_lbfgsb()), xs, targets
    return [
        Way("lbfgs, jaxopt", "jaxopt", functools.partial(batched, *given)),
        Way(ONE_BY_ONE, "jaxopt", functools.partial(one_by_one, *given)),
        Way("lbfgs, SciPy loop", "SciPy", functools.partial(scipy_loop, network, xs, targets)),
    ]


def many(attack: attacks.Attack, xs: np.ndarray, targets: np.ndarray) -> Outcome:
    """All images through the runner."""
    result, seconds = timed(runner.attack_images, attack, xs, targets)
    return _outcome(result, seconds / len(xs))


def batched(attack: attacks.Attack, xs: np.ndarray, targets: np.ndarray) -> Outcome:
    """All images at once, under `jax.vmap`."""
    result, seconds = timed(vmapped(attack), *jax.device_put((xs, targets)))
    return _outcome(result, seconds / len(xs))


def one_by_one(attack: attacks.Attack, xs: np.ndarray, targets: np.ndarray) -> Outcome:
    """One image after the other, in a Python loop."""
    run = jax.jit(lambda attack, x, target: attack(x, target))
    jax.block_until_ready(run(attack, xs[0], targets[0]))
    start = time.perf_counter()
    found = [
        jax.block_until_ready(run(attack, x, target)) for x, target in zip(xs, targets, strict=True)
    ]
    seconds = time.perf_counter() - start
    return _outcome(jax.tree.map(lambda *leaves: np.stack(leaves), *found), seconds / len(xs))


def scipy_loop(network: networks.Network, xs: np.ndarray, targets: np.ndarray) -> Outcome:
    """SciPy's L-BFGS-B, image by image, in float64, where it needs the fewest steps."""
    with jax.enable_x64(True):
        attack = scipy_lbfgs(_in_double(network))
        attack(xs[0], int(targets[0]))
        start = time.perf_counter()
        found = [attack(x, int(target)) for x, target in zip(xs, targets, strict=True)]
        seconds = time.perf_counter() - start
    return Outcome(
        x_adv=np.stack([result.x_adv for result in found]),
        success=np.array([result.success for result in found]),
        num_evals=np.array([result.num_evals for result in found]),
        seconds=seconds / len(xs),
    )


# --- results ---------------------------------------------------------------------------------


def compare(
    outcomes: Sequence[tuple[Way, Outcome]],
    network: networks.Network,
    xs: np.ndarray,
    targets: np.ndarray,
    *,
    gradient: float,
) -> list[Row]:
    """One row for each method.

    Distortion and gap are means over the images on which the method succeeded, among the first
    ones, which all methods attacked. The other entries are over all the images that it attacked.
    """
    few = min(len(outcome.success) for _, outcome in outcomes)
    measured = [verify(network, xs, targets, outcome.x_adv) for _, outcome in outcomes]
    distortions = np.stack(
        [
            np.where(outcome.success, distortion, np.inf)[:few]
            for (_, outcome), (_, distortion) in zip(outcomes, measured, strict=True)
        ]
    )
    best = distortions.min(axis=0)
    rows = []
    for (way, outcome), (verified, _), distortion in zip(
        outcomes, measured, distortions, strict=True
    ):
        found = np.isfinite(distortion)
        evaluations = float(outcome.num_evals.mean())
        rows.append(
            {
                "attack": way.name,
                "by": way.by,
                "images": len(outcome.success),
                "success": float(outcome.success.mean()),
                "success_in_float64": float((outcome.success & verified).mean()),
                "distortion": _mean(distortion[found]),
                "gap": _mean(distortion[found] / best[found] - 1),
                "evaluations": evaluations,
                "milliseconds": 1e3 * outcome.seconds,
                "images_per_second": 1 / outcome.seconds,
                "seconds_over_gradients": outcome.seconds / (evaluations * gradient),
            }
        )
    return rows


def verify(
    network: networks.Network, xs: np.ndarray, targets: np.ndarray, x_adv: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Whether the network predicts the targets in float64 too, and the distortions."""
    n = len(x_adv)
    with jax.enable_x64(True):
        x, inside = (jnp.asarray(array, jnp.float64) for array in (xs[:n], np.clip(x_adv, 0, 1)))
        logits = jax.vmap(_in_double(network))(inside)
        distortions = jax.vmap(metrics.distortion)(x, inside)
    return np.argmax(logits, axis=1) == targets[:n], np.asarray(distortions)


def describe(content: Content) -> str:
    """A line for each method; "slower" is relative to the first one."""
    run, config = content["runs"][0], content["config"]
    return f"""\
{config["network"]}, {run["rows"][0]["images"]} test images for our attacks. The others attacked the
first {run["images_compared"]}, over which distortion and gap are taken. A batched gradient takes
{run["microseconds_a_gradient"]:.1f} us per image.

{table(run["rows"])}

![The gap against the evaluations](benchmark.png)"""


def table(rows: Sequence[Row]) -> str:
    """A line for each method."""
    return markdown.table(
        [
            ("attack", row["attack"]),
            ("success", markdown.percent(row["success"])),
            ("in float64", markdown.percent(row["success_in_float64"])),
            ("distortion", "-" if row["distortion"] is None else f"{row['distortion']:.5f}"),
            ("gap", "-" if row["gap"] is None else markdown.percent(row["gap"], 3)),
            ("evaluations", f"{row['evaluations']:,.1f}"),
            ("ms/image", f"{row['milliseconds']:,.2f}"),
            ("images/s", f"{row['images_per_second']:,.2f}"),
            ("slower", f"{row['milliseconds'] / rows[0]['milliseconds']:,.1f} x"),
            ("/gradients", f"{row['seconds_over_gradients']:,.1f} x"),
        ]
        for row in rows
    )


def draw(content: Content, arrays: Arrays) -> dict[str, Figure]:
    """The gap against the evaluations, for the methods that succeeded on every image."""
    del arrays
    run, config = content["runs"][0], content["config"]
    rows = run["rows"]
    title = f"{config['network']} on {config['dataset'].upper()}, {run['images_compared']} images"
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot(
        title=title,
        xlabel="gradient evaluations per image",
        ylabel="distortion above the best known, %",
    )
    for row in rows:
        if row["success"] < 1 or row["attack"] == ONE_BY_ONE:  # coincides with its batched form
            continue
        color, label = LOOKS[row["by"]]
        point = row["evaluations"], 100 * row["gap"]
        axes.plot(*point, "o", color=color)
        axes.annotate(row["attack"], point, textcoords="offset points", size=9, **label)
    for by in dict.fromkeys(row["by"] for row in rows):
        axes.plot([], [], "o", color=LOOKS[by][0], label=by)
    axes.legend(loc="lower right", frameon=False)
    axes.set_xscale("log")
    axes.set_yscale("symlog", linthresh=0.01)  # the gap of the best method may be 0
    left, right = axes.get_xlim()
    axes.set_xlim(left / 5, 10 * right)
    axes.set_ylim(-0.002, 2 * axes.get_ylim()[1])
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return {"benchmark.png": figure}


def _in_double(network: networks.Network) -> jax.tree_util.Partial:
    double = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), network.params)
    return jax.tree_util.Partial(network.model.apply, double)


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if values.size else None


def _outcome(result: attacks.AttackResult, seconds: float) -> Outcome:
    x_adv, success, num_evals = map(np.asarray, (result.x_adv, result.success, result.num_evals))
    return Outcome(x_adv, success, num_evals, seconds)
