"""The field's minimum-distortion attacks, from foolbox, to compare with.

They attack the net through foolbox's own JAX backend, all images in one batch. The net and its
gradient are compiled; the attacks' own arithmetic foolbox dispatches op by op, and there most of
their time goes.
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
from jaxtyping import Float, Int

from advjax.types import LogitsFn
from experiments.common.peers import Outcome, Way


def require(*packages: str) -> None:
    """Tells at once, and how to go on, where a package that the peers need is not installed."""
    for name in packages:
        if importlib.util.find_spec(name) is None:
            raise ImportError(
                f"the peers need {name}, which is not here: pip install 'advjax[peers]', or leave "
                "them out with --no-peers"
            )


def ways(
    logits_fn: LogitsFn,
    xs: Float[np.ndarray, " n *shape"],
    targets: Int[np.ndarray, " n"],
    *,
    starts: Float[np.ndarray, " m *shape"],
    max_steps: int = 10_000,
) -> list[Way]:
    """Carlini-Wagner, Brendel-Bethge and DDN in L2, with foolbox's defaults but for the steps.

    Args:
        logits_fn: The net, of one example.
        xs: The images, with pixels in [0, 1].
        targets: A class for each.
        starts: Images of all the classes. Brendel-Bethge starts from the nearest that the net gives
            the target class.
        max_steps: What to cut the steps to, for a trial.

    Returns:
        The ways of attacking. Carlini-Wagner has nine rounds of so many steps.
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
    """DDN with so many steps, and Carlini-Wagner with five rounds of two thirds as many."""
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

    def model(images):
        # For each gradient foolbox differentiates the model anew, and then calls it with a tracer.
        nonlocal gradients
        gradients += isinstance(images, jax.core.Tracer)
        return logits(images)

    def run(steps: int) -> tuple[np.ndarray, np.ndarray]:
        with warnings.catch_warnings():  # that numba will take a while to compile
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
