"""Minimum-distortion attacks from foolbox, to compare with.

They attack the network through foolbox's own JAX backend, all images in one batch. The network and
its gradient are compiled; foolbox dispatches the arithmetic of the attacks op by op, which is where
most of the time goes.
"""

import functools
import importlib.util
import time
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from advjax.types import LogitsFn
from experiments.common.peers import Outcome, Way


def require(*packages: str) -> None:
    """Raise, with the remedy, if a package that the peers need is not installed."""
    for name in packages:
        if importlib.util.find_spec(name) is None:
            raise ImportError(
                f"peers: {name} is not installed, expected it for foolbox's attacks; "
                "pip install 'advjax[peers]', or leave them out."
            )


def ways(
    logits_fn: LogitsFn,
    xs: Float[np.ndarray, " n *shape"],
    targets: Int[np.ndarray, " n"],
    *,
    starts: Float[np.ndarray, " m *shape"],
    max_steps: int = 10_000,
) -> list[Way]:
    """Carlini-Wagner, Brendel-Bethge and DDN in L2, with foolbox's defaults except the steps.

    Args:
        logits_fn: The network, of one example.
        xs: The images, with pixels in [0, 1].
        targets: A class to reach for each.
        starts: Images of all classes. Brendel-Bethge starts from the nearest one that the network
            assigns to the target class.
        max_steps: An upper limit on the steps, for a trial.

    Returns:
        The methods. Carlini-Wagner has nine rounds of that many steps.
    """
    from foolbox import attacks

    attack = functools.partial(_attack, logits_fn, xs, targets)
    classes = np.asarray(jax.vmap(logits_fn)(jnp.asarray(starts)).argmax(axis=1))
    nearest = np.stack(
        [_nearest(x, starts[classes == target]) for x, target in zip(xs, targets, strict=True)]
    )
    brendel_bethge = functools.partial(attack, starting_points=jnp.asarray(nearest))
    return [
        Way(f"{name} {steps:,}", "foolbox", functools.partial(run, make, steps))
        for name, run, make, budgets in (
            ("Carlini-Wagner 9 x", attack, attacks.L2CarliniWagnerAttack, (10_000, 1_000)),
            ("Brendel-Bethge", brendel_bethge, attacks.L2BrendelBethgeAttack, (1_000,)),
            ("DDN", attack, attacks.DDNAttack, (1_000, 100)),
        )
        for steps in sorted({min(budget, max_steps) for budget in budgets}, reverse=True)
    ]


def short_ways(
    logits_fn: LogitsFn,
    xs: Float[np.ndarray, " n *shape"],
    targets: Int[np.ndarray, " n"],
    *,
    steps: int,
) -> list[Way]:
    """DDN with a number of steps, and Carlini-Wagner with five rounds of two thirds as many."""
    from foolbox import attacks

    attack = functools.partial(_attack, logits_fn, xs, targets)
    carlini_wagner = functools.partial(attacks.L2CarliniWagnerAttack, binary_search_steps=5)
    rounds = 2 * steps // 3
    return [
        Way(f"DDN {steps}", "foolbox", functools.partial(attack, attacks.DDNAttack, steps)),
        Way(
            f"Carlini-Wagner 5 x {rounds}",
            "foolbox",
            functools.partial(attack, carlini_wagner, rounds),
        ),
    ]


def _attack(
    logits_fn: LogitsFn,
    xs: Float[np.ndarray, " n *shape"],
    targets: Int[np.ndarray, " n"],
    make: Callable[..., Any],
    steps: int,
    **options: Any,
) -> Outcome:
    import foolbox

    logits = jax.jit(jax.vmap(logits_fn))
    gradients = 0

    def model(images: Array) -> Array:
        # For each gradient foolbox differentiates the model again, calling it with a tracer.
        nonlocal gradients
        gradients += isinstance(images, jax.core.Tracer)
        return logits(images)

    def run(steps: int) -> tuple[np.ndarray, np.ndarray]:
        with warnings.catch_warnings():  # numba warns that it compiles for a while
            warnings.filterwarnings("ignore", "At the first initialisation", UserWarning)
            attack = make(steps=steps)
        x_adv, _, success = attack(
            foolbox.JAXModel(model, bounds=(0, 1)),
            jnp.asarray(xs),
            foolbox.criteria.TargetedMisclassification(jnp.asarray(targets)),
            epsilons=None,
            **options,
        )
        return np.asarray(x_adv), np.asarray(success)

    run(2)  # compiles
    gradients = 0
    start = time.perf_counter()
    x_adv, success = run(steps)
    seconds = time.perf_counter() - start
    return Outcome(x_adv, success, np.full(len(xs), gradients), seconds / len(xs))


def _nearest(x: Float[np.ndarray, "*shape"], others: Float[np.ndarray, " m *shape"]) -> np.ndarray:
    return others[np.argmin([np.sum((other - x) ** 2) for other in others])]
