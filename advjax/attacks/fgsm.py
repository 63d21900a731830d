"""The fast gradient sign method: one gradient, and a step of fixed size in the largest norm."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from advjax import checks, metrics
from advjax.attacks.base import AttackResult, Status, admission, constant
from advjax.types import Box, LogitsFn


def fgsm(
    logits_fn: LogitsFn,
    x: Float[Array, "*shape"],
    label: Int[Array, ""] | int,
    *,
    epsilon: float | Float[Array, ""],
    box: Box | tuple = Box(),  # noqa: B008 an immutable default
    targeted: bool = False,
) -> AttackResult:
    """The fast baseline: move every pixel by `epsilon`, up or down as the cross-entropy's gradient.

    `x_adv = clip(x + epsilon * sign(grad cross_entropy(logits_fn(x), label)), *box)`, or with a
    minus towards a target. The step is taken whether or not the image needs it, so that its size
    is the same for every image; `lbfgs` and `minimum_norm` look for the smallest one instead.

    Args:
        logits_fn: The model: logits `(classes,)` of ONE example like `x`. Any pure function will
            do: `lambda x: model.apply(params, x)`.
        x: The image, of any shape, floating. It may lie outside the box; the step starts there
            nevertheless.
        label: The class to leave, as a rule the true one; with `targeted` the class to reach.
        epsilon: The step of each pixel, at least 0 and in the unit of `x`. It may be traced, as
            under `jax.vmap` over several.
        box: `(lower, upper)`, each broadcast to `x`; [0, 1] by default.
        targeted: Whether to step towards `label`.

    Returns:
        An `AttackResult`. `success` says that the model does not give `x_adv` the class `label`,
        or with `targeted` that it does; the status is then `CONVERGED`, and otherwise
        `NOT_FOUND`. `weight` is `epsilon`. Where the status tells of bad data (a label that is no
        class counts as `INVALID_TARGET`) no step is taken: `x_adv` is the image moved into the
        box, and `weight` 0. `jax.grad` takes the result for a constant.

    Raises:
        TypeError: If `x` is not floating, `label` not an integer, or `logits_fn` no function.
        ValueError: If `logits_fn` does not return `(classes,)`, a bound does not broadcast to `x`,
            or `epsilon` is not one number of at least 0.

    Source: Goodfellow, Shlens and Szegedy (2014), section 4.
    """
    x = checks.floating("x", x)
    label = checks.class_index("label", label)
    classes = checks.logits(logits_fn, x).shape[0]
    logits_fn, x, bounds = constant(logits_fn, x, checks.box(box, x))
    lower, upper = map(jnp.asarray, bounds)
    # Half-precision images are moved in float32 and rounded before the model sees them.
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    epsilon = jax.lax.stop_gradient(checks.nonnegative("epsilon", epsilon, dtype))

    admitted = admission(x, label, classes, bounds)
    origin = jnp.where(jnp.isfinite(x), x, 0).astype(dtype)

    def objective(origin):
        return _log_odds(logits_fn(origin.astype(x.dtype)).astype(dtype), label)

    value, grad = jax.value_and_grad(objective)(origin)
    finite = jnp.isfinite(value) & jnp.all(jnp.isfinite(grad)) & jnp.isfinite(epsilon)
    status = jnp.where((admitted == Status.RUNNING) & ~finite, Status.NONFINITE, admitted)
    stepped = status == Status.RUNNING

    step = (-epsilon if targeted else epsilon) * jnp.sign(grad)
    moved = jnp.where(stepped, origin + step, origin)
    clipped = jnp.clip(moved, lower, upper)
    x_adv = jnp.where(status == Status.EMPTY_BOX, moved, clipped).astype(x.dtype)

    logits = logits_fn(x_adv)
    prediction = jnp.argmax(logits).astype(jnp.int32)
    aim = (prediction == label) if targeted else (prediction != label)
    success = stepped & aim & jnp.all(~jnp.isnan(logits))
    outcome = jnp.where(success, Status.CONVERGED, Status.NOT_FOUND)
    return AttackResult(
        x_adv=x_adv,
        success=success,
        distortion=metrics.distortion(origin, x_adv.astype(dtype)),
        weight=jnp.where(stepped, epsilon, 0),
        prediction=prediction,
        status=jnp.where(stepped, outcome, status).astype(jnp.int32),
        num_evals=(admitted == Status.RUNNING).astype(jnp.int32),
    )


def _log_odds(logits: Float[Array, " classes"], label: Int[Array, ""]) -> Float[Array, ""]:
    """The log-odds against a class under a softmax, of which the cross-entropy is the softplus.

    So the signs of the two gradients agree, but this one does not vanish in rounding where the
    model is sure of itself, at a lead of 17 in float32.
    """
    others = jnp.where(jnp.arange(len(logits)) == label, -jnp.inf, logits)
    return jax.nn.logsumexp(others) - logits[label]
