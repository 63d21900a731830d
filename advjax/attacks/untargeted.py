"""An attack on any other class, from an attack on a given one."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from advjax import checks
from advjax.attacks.base import AttackResult
from advjax.types import LogitsFn


def untargeted(
    attack: Callable[[LogitsFn, Float[Array, "*shape"], Int[Array, ""]], AttackResult],
    logits_fn: LogitsFn,
    x: Float[Array, "*shape"],
    label: Int[Array, ""] | int,
    *,
    k: int = 9,
) -> AttackResult:
    """Find the nearest image of any class but the label's, among the k likeliest ones.

    The targets are attacked side by side under `jax.vmap`. With all the other classes as targets
    this is the untargeted distance itself, as far as `attack` finds it; on MNIST it is about 0.4
    of the distance to a random target.

    Args:
        attack: `(logits_fn, x, target) -> AttackResult`: `attacks.minimum_norm`, `attacks.lbfgs`,
            or either with options, as `functools.partial(attacks.lbfgs, penalty=losses.l2)`.
        logits_fn: The model: logits `(classes,)` of ONE example like `x`.
        x: The image, of any shape, floating.
        label: The class to leave. If the model gives `x` another one already, that is a target of
            distortion 0.
        k: How many targets to try, the likeliest first; at most all other classes.

    Returns:
        The successful `AttackResult` of the smallest distortion, and if there is none the first
        target's. `num_evals` is the sum over the targets.

    Raises:
        TypeError: If `x` is not floating or `label` not an integer.
        ValueError: If `k` is not a positive integer, or as `attack` does.

    Source: Szegedy et al. (2013), section 4.1: D(x, l) for the nearest l.
    """
    x = checks.floating("x", x)
    label = checks.class_index("label", label)
    classes = checks.logits(logits_fn, x).shape[0]
    k = min(checks.positive_int("k", k), classes - 1)

    logits = jnp.nan_to_num(logits_fn(x), nan=-jnp.inf)
    others = jnp.where(jnp.arange(classes) == label, -jnp.inf, logits)
    order = jnp.argsort(others, descending=True)
    # Minus infinity may tie with the label's place, which comes last whatever the logits.
    targets = order[jnp.argsort(order == label, stable=True)][:k]
    results = jax.vmap(lambda target: attack(logits_fn, x, target))(targets)
    nearest = jnp.argmin(jnp.where(results.success, results.distortion, jnp.inf))
    best = jax.tree.map(lambda leaf: leaf[nearest], results)
    return best._replace(num_evals=jnp.sum(results.num_evals))
