"""An attack on any other class, from an attack on a given one."""

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

    The targets are attacked side by side: a step makes one value_and_grad for each. With all the
    other classes as targets this is the untargeted distance itself, as far as `attack` finds it; on
    MNIST it is about 0.4 of the distance to a random target.

    Args:
        attack: The attack on one target: `attacks.minimum_norm(logits_fn)`, or any other.
        k: How many targets to try, the likeliest first; at most all other classes.

    Returns:
        An `Attack`: `(x, label) -> AttackResult`, where `label` is the class to leave. If the model
        gives `x` another one already, that is a target of distortion 0. The result is the
        successful one of the smallest distortion, and if there is none the first target's;
        `num_evals` is the sum over the targets.

    Raises:
        TypeError: If `attack` is no `Attack`.
        ValueError: If `k` is not a positive integer.

    Reference: Szegedy et al. (2013), section 4.1: D(x, l) for the nearest l.
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
        method: That of the attack on one target.
        k: The number of targets.
    """

    method: Method
    k: int = dataclasses.field(metadata={"static": True})

    def init(self, attack: Attack, x: Float[Array, "*shape"], label: Int[Array, ""]) -> _State:
        """Rank the other classes by their logits, and begin with each of the first k."""
        label = checks.class_index("label", label)
        classes = checks.logits(attack.logits_fn, x).shape[0]
        logits = jnp.nan_to_num(attack.logits_fn(x), nan=-jnp.inf)
        others = jnp.where(jnp.arange(classes) == label, -jnp.inf, logits)
        order = jnp.argsort(others, descending=True)
        # Minus infinity may tie with the label's place, which comes last whatever the logits.
        targets = order[jnp.argsort(order == label, stable=True)][: min(self.k, classes - 1)]
        return _State(jax.vmap(lambda target: self.method.init(attack, x, target))(targets))

    def step(self, attack: Attack, state: _State) -> _State:
        """Step every target's attack."""
        return _State(jax.vmap(lambda one: self.method.step(attack, one))(state.targets))

    def done(self, attack: Attack, state: _State) -> Bool[Array, ""]:
        """Whether all have ended."""
        return jnp.all(jax.vmap(lambda one: self.method.done(attack, one))(state.targets))

    def result(self, attack: Attack, state: _State) -> AttackResult:
        """Return the nearest."""
        results = jax.vmap(lambda one: self.method.result(attack, one))(state.targets)
        nearest = jnp.argmin(jnp.where(results.success, results.distortion, jnp.inf))
        best = jax.tree.map(lambda leaf: leaf[nearest], results)
        return best._replace(num_evals=jnp.sum(results.num_evals))
