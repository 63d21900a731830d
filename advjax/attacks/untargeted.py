"""An untargeted attack, made of a targeted one."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from advjax import checks
from advjax.attacks.attack import Attack, Method
from advjax.attacks.result import AttackResult


def untargeted(attack: Attack, *, k: int = 9) -> Attack:
    """Find the nearest image of any class but the label's, among the k likeliest ones.

    The targets are attacked side by side: a step makes one value_and_grad for each. With all other
    classes as targets the result has the untargeted distance itself, up to the precision of
    `attack`. On MNIST it is about 0.4 of the distance to a random target.

    Args:
        attack: The targeted attack: `attacks.minimum_norm(logits_fn)`, or any other.
        k: Number of targets to try, those of the largest logits; at most all other classes.

    Returns:
        An `Attack`: `(x, label) -> AttackResult`, where `label` is the class to leave. If the model
        predicts another class for `x` already, that class has distortion 0. The result is the
        successful one with the smallest distortion, or that of the first target if there is none;
        `num_evals` is the sum over the targets.

    Raises:
        TypeError: If `attack` is not an `Attack`.
        ValueError: If `k` is not a positive integer.

    Reference: Szegedy et al. (2013), section 4.1: the smallest D(x, l) over the classes l.
    """
    if not isinstance(attack, Attack):
        raise TypeError(
            f"attack: {type(attack).__name__}, expected an Attack, as "
            "attacks.minimum_norm(logits_fn) returns."
        )
    method = AnyOtherClass(attack.method, checks.positive_int("k", k))
    return dataclasses.replace(attack, method=method)


class _State(NamedTuple):
    targets: Any
    """The states of the attacks on the targets, along a leading axis."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AnyOtherClass:
    """The method of `untargeted`.

    Args:
        method: The method of the targeted attack.
        k: The number of targets.
    """

    method: Method
    k: int = dataclasses.field(metadata={"static": True})

    def init(self, attack: Attack, x: Float[Array, "*shape"], label: Int[Array, ""]) -> _State:
        """Rank the other classes by their logits, and start an attack on each of the first k."""
        label = checks.class_index("label", label)
        classes = checks.logits(attack.logits_fn, x).shape[0]
        logits = jnp.nan_to_num(attack.logits_fn(x), nan=-jnp.inf)
        others = jnp.where(jnp.arange(classes) == label, -jnp.inf, logits)
        order = jnp.argsort(others, descending=True)
        # A logit of minus infinity ties with the label, which must come last in any case.
        targets = order[jnp.argsort(order == label, stable=True)][: min(self.k, classes - 1)]
        return _State(jax.vmap(lambda target: self.method.init(attack, x, target))(targets))

    def step(self, attack: Attack, state: _State) -> _State:
        """Make one step of each target's attack."""
        return _State(jax.vmap(lambda one: self.method.step(attack, one))(state.targets))

    def done(self, attack: Attack, state: _State) -> Bool[Array, ""]:
        """Whether the attacks on all targets have ended."""
        return jnp.all(jax.vmap(lambda one: self.method.done(attack, one))(state.targets))

    def result(self, attack: Attack, state: _State) -> AttackResult:
        """Return the result of the nearest target."""
        results = jax.vmap(lambda one: self.method.result(attack, one))(state.targets)
        nearest = jnp.argmin(jnp.where(results.success, results.distortion, jnp.inf))
        best = jax.tree.map(lambda leaf: leaf[nearest], results)
        return best._replace(num_evals=jnp.sum(results.num_evals))
