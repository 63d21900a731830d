"""The fast gradient sign method: one gradient, and a step of fixed size in the largest norm."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from advjax import checks, metrics
from advjax.attacks.attack import Attack
from advjax.attacks.result import AttackResult, Status, admission
from advjax.types import Box, LogitsFn


def fgsm(
    logits_fn: LogitsFn,
    *,
    epsilon: float | Float[Array, ""],
    box: Box | tuple = Box(),  # noqa: B008 an immutable default
    targeted: bool = False,
) -> Attack:
    """Move every pixel by `epsilon` in the direction of the sign of the loss gradient.

    `x_adv = clip(x + epsilon * sign(grad cross_entropy(logits_fn(x), label)), *box)`, or with a
    minus if `targeted`. The step has the same size for every image, whether or not a smaller one
    would do; `lbfgs` and `minimum_norm` find the smallest perturbation instead.

    Args:
        logits_fn: The model: logits `(classes,)` of ONE example, any pure function, such as
            `lambda x: model.apply(params, x)`.
        epsilon: The step of each pixel, at least 0, in the unit of the image. It may be traced, to
            `jax.vmap` over several.
        box: `(lower, upper)`, each broadcast to the image; [0, 1] by default.
        targeted: Whether to step towards a class instead of away from it.

    Returns:
        An `Attack`: `(x, label) -> AttackResult`, where `label` is the class to leave, usually the
        true one; with `targeted` it is the class to reach. `success` is whether the model predicts
        another class than the label, or with `targeted` the label; the status is then `CONVERGED`,
        and otherwise `NOT_FOUND`. `multiplier` is `epsilon`. If the status reports bad data, no
        step is taken: `x_adv` is the image clipped to the box, and `multiplier` is 0.

    Raises:
        TypeError: If `logits_fn` is not callable.
        ValueError: If `box` is not a pair, or `epsilon` is not one number of at least 0.

    Reference: Goodfellow, Shlens and Szegedy (2014), section 4.
    """
    epsilon = checks.nonnegative("epsilon", epsilon, jnp.result_type(float))
    return Attack(logits_fn, Box(*checks.pair("box", box)), GradientSign(epsilon, targeted))


class _State(NamedTuple):
    x: Float[Array, "*shape"]
    label: Int[Array, ""]
    x_adv: Float[Array, "*shape"]
    status: Int[Array, ""]
    num_evals: Int[Array, ""]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GradientSign:
    """The method of `fgsm`, of a single step.

    Args:
        epsilon: The length of the step in the maximum norm.
        targeted: Whether to step towards the class instead of away from it.
    """

    epsilon: Float[Array, ""]
    targeted: bool = dataclasses.field(metadata={"static": True})

    def init(self, attack: Attack, x: Float[Array, "*shape"], label: Int[Array, ""]) -> _State:
        """Return the image clipped to the box."""
        label = checks.class_index("target" if self.targeted else "label", label)
        classes = checks.logits(attack.logits_fn, x).shape[0]
        box = checks.box(attack.box, x)
        status = admission(x, label, classes, box)
        x = jnp.where(jnp.isfinite(x), x, 0)
        x_adv = jnp.where(status == Status.EMPTY_BOX, x, jnp.clip(x, *box))
        return _State(x, label, x_adv, status, jnp.int32(0))

    def step(self, attack: Attack, state: _State) -> _State:
        """Take the step."""
        # Half-precision images are moved in float32 and rounded before the model sees them.
        like, dtype = state.x.dtype, jnp.promote_types(state.x.dtype, jnp.float32)
        epsilon = jax.lax.stop_gradient(self.epsilon).astype(dtype)

        def objective(origin: Float[Array, "*shape"]) -> Float[Array, ""]:
            return _log_odds(attack.logits_fn(origin.astype(like)).astype(dtype), state.label)

        origin = state.x.astype(dtype)
        value, grad = jax.value_and_grad(objective)(origin)
        finite = jnp.isfinite(value) & jnp.all(jnp.isfinite(grad)) & jnp.isfinite(epsilon)
        moved = origin + (-epsilon if self.targeted else epsilon) * jnp.sign(grad)
        x_adv = jnp.clip(moved, *checks.box(attack.box, origin)).astype(like)
        running = state.status == Status.RUNNING
        stepped = jnp.where(finite, Status.CONVERGED, Status.NONFINITE).astype(jnp.int32)
        return state._replace(
            x_adv=jnp.where(running & finite, x_adv, state.x_adv),
            status=jnp.where(running, stepped, state.status),
            num_evals=state.num_evals + running,
        )

    def done(self, attack: Attack, state: _State) -> Bool[Array, ""]:
        """Whether the step has been taken."""
        return state.status != Status.RUNNING

    def result(self, attack: Attack, state: _State) -> AttackResult:
        """Return the moved image and its prediction."""
        logits = attack.logits_fn(state.x_adv)
        prediction = jnp.argmax(logits).astype(jnp.int32)
        is_label = prediction == state.label
        stepped = state.status == Status.CONVERGED
        aim = is_label if self.targeted else ~is_label
        success = stepped & aim & jnp.all(~jnp.isnan(logits))
        dtype = jnp.promote_types(state.x.dtype, jnp.float32)
        return AttackResult(
            x_adv=state.x_adv,
            success=success,
            distortion=metrics.distortion(state.x.astype(dtype), state.x_adv.astype(dtype)),
            multiplier=jnp.where(stepped, self.epsilon.astype(dtype), 0),
            prediction=prediction,
            status=jnp.where(stepped & ~success, Status.NOT_FOUND, state.status).astype(jnp.int32),
            num_evals=state.num_evals,
        )


def _log_odds(logits: Float[Array, " classes"], label: Int[Array, ""]) -> Float[Array, ""]:
    """The log-odds against a class under a softmax; the cross-entropy is its softplus.

    So both gradients have the same signs. But that of the cross-entropy rounds to 0 where the model
    is confident, from a margin of 17 in float32, and this one does not.
    """
    others = jnp.where(jnp.arange(len(logits)) == label, -jnp.inf, logits)
    return jax.nn.logsumexp(others) - logits[label]
