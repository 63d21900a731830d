"""What an attack is: a pure function of one image, bound to a model, and a pytree."""

import dataclasses
import warnings
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from advjax import checks, sharding
from advjax.attacks import precision
from advjax.attacks.result import AttackResult
from advjax.functions import Function
from advjax.types import Box, LogitsFn

_ROUNDING_OF_SUM = 1e-2  # of probabilities, which bfloat16 rounds


@runtime_checkable
class Method(Protocol):
    """The algorithm of an attack: four pure functions of an `Attack` and one image.

    A method is a pytree, most often without leaves: a frozen dataclass of options, compared by
    value and registered with `jax.tree_util.register_static`. It takes the model and the box from
    the attack that it is given, so that one method attacks any model.
    """

    def init(self, attack: "Attack", x: Float[Array, "*shape"], target: Int[Array, ""]) -> Any:
        """Return the state before the first step, without a gradient of the model."""

    def step(self, attack: "Attack", state: Any) -> Any:
        """Make one value_and_grad of the model; leave the result as it is once done."""

    def done(self, attack: "Attack", state: Any) -> Bool[Array, ""]:
        """Whether the attack has ended."""

    def result(self, attack: "Attack", state: Any) -> AttackResult:
        """Return the result as it stands, with one prediction of the model."""


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False)
class Attack:
    """An attack on one model: to a model what `jax.grad(f)` is to a function.

    Call it with an image and a class, under `jax.jit`, `jax.vmap` or `jax.shard_map`. `jax.grad`
    takes its result for a constant. It is also a pytree, whose leaves are the box and the arrays
    that the model binds: pass it to a compiled function, and another model of the same shapes does
    not compile again.

    To run the steps yourself, call `init`, then `step` until `done`, then `result`. A step makes
    one value_and_grad of the model.

    Args:
        logits_fn: The model: logits `(classes,)` of ONE example. Any callable, or callable pytree.
        box: `(lower, upper)`, each broadcast to the image.
        method: The algorithm.

    Raises:
        TypeError: If `logits_fn` is not callable.
        ValueError: If `box` is not a pair.
    """

    logits_fn: LogitsFn
    box: Box
    method: Method

    def __post_init__(self) -> None:
        checks.model("logits_fn", self.logits_fn)
        box = Box(*(_leaf(bound) for bound in checks.pair("box", self.box)))
        object.__setattr__(self, "logits_fn", Function(self.logits_fn))
        object.__setattr__(self, "box", box)

    def __call__(self, x: Float[Array, "*shape"], target: Int[Array, ""] | int) -> AttackResult:
        """Attack one image.

        Args:
            x: The image, of any shape, floating, in the box.
            target: The class to reach; for an untargeted attack the label to leave.

        Returns:
            An `AttackResult`, whose `status` says what was wrong with traced data, if anything.

        Raises:
            TypeError: If `x` is not floating or `target` not an integer.
            ValueError: If the model does not return `(classes,)`, a bound does not broadcast to
                `x`, or `x` is not traced and outside the box.
        """
        x = checks.floating("x", x)
        checks.inside("x", x, self.box)
        if jax.config.jax_debug_nans:  # type: ignore[attr-defined]
            self.logits_fn(x)  # not compiled, so that JAX names the operation that returns NaN
        result, probabilities = sharding.automatic(_hoist_and_run)(self, x, target)
        _warn_of_probabilities(probabilities)
        return result

    def init(self, x: Float[Array, "*shape"], target: Int[Array, ""] | int) -> Any:
        """Return the state before the first step."""
        state = self.method.init(self, checks.floating("x", x), target)  # type: ignore[arg-type]
        return sharding.vary_like(state, (self, x, target))

    def step(self, state: Any) -> Any:
        """Make one value_and_grad of the model; a step after the end does not change the result."""
        return self.method.step(self, state)

    def done(self, state: Any) -> Bool[Array, ""]:
        """Whether the attack has ended."""
        return self.method.done(self, state)

    def result(self, state: Any) -> AttackResult:
        """Return the result as it stands."""
        return self.method.result(self, state)

    def hoist(self, x: Float[Array, "*shape"] | jax.ShapeDtypeStruct) -> "Attack":
        """Return the same attack for images like `x` alone, with all arrays of the model as leaves.

        Arrays that the model closes over, such as the parameters in a lambda, become arguments of
        the compiled program too. On an accelerator matrix products are computed in full precision,
        unless `jax_default_matmul_precision` is set. `__call__` and the runner do this themselves.

        Args:
            x: An image, or its shape and dtype.

        Returns:
            An `Attack` whose model is a jaxpr.

        Raises:
            TypeError: If the model does not return floating logits.
            ValueError: If it does not return `(classes,)`.
        """
        checks.logits(self.logits_fn, x)
        with precision.full_unless_chosen():
            return dataclasses.replace(self, logits_fn=Function(self.logits_fn).hoist(x))

    def tree_flatten_with_keys(self) -> tuple[Any, None]:
        """Split into the three fields, each of which is a pytree."""
        names = [field.name for field in dataclasses.fields(self)]
        return [(jax.tree_util.GetAttrKey(name), getattr(self, name)) for name in names], None

    @classmethod
    def tree_unflatten(cls, _: None, children: Any) -> "Attack":
        """Join the fields without checks, as transformations put placeholders in their place."""
        attack = object.__new__(cls)
        for field, child in zip(dataclasses.fields(cls), children, strict=True):
            object.__setattr__(attack, field.name, child)
        return attack


def _hoist_and_run(
    attack: Attack, x: Float[Array, "*shape"], target: Int[Array, ""]
) -> tuple[AttackResult, Bool[Array, ""]]:
    return _run(*jax.lax.stop_gradient((attack.hoist(x), x)), target)


@jax.jit
def _run(
    attack: Attack, x: Float[Array, "*shape"], target: Int[Array, ""]
) -> tuple[AttackResult, Bool[Array, ""]]:
    """The result, and whether the model returns probabilities."""
    end = jax.lax.while_loop(lambda state: ~attack.done(state), attack.step, attack.init(x, target))
    logits = attack.logits_fn(x)
    probabilities = jnp.all(logits >= 0) & (jnp.abs(jnp.sum(logits) - 1) < _ROUNDING_OF_SUM)
    return attack.result(end), probabilities


def _warn_of_probabilities(found: Bool[Array, ""]) -> None:
    if not isinstance(found, jax.core.Tracer) and found:
        warnings.warn(
            "logits_fn: returns numbers that are positive and sum to 1, expected logits; attack "
            "the model without its softmax, as the gradient of probabilities vanishes.",
            stacklevel=3,
        )


def _leaf(bound: Any) -> Any:
    return bound if isinstance(bound, jax.Array | np.ndarray) else np.asarray(bound)
