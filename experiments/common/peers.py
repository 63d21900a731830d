"""The interface of the compared methods, and the paper's attack with SciPy's L-BFGS-B."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from scipy import optimize

from advjax import losses
from advjax.types import LogitsFn


class Outcome(NamedTuple):
    """The results of one method: arrays with an entry for each image."""

    x_adv: np.ndarray
    success: np.ndarray
    """As the method itself reports it."""
    num_evals: np.ndarray
    seconds: float
    """Per image, without compilation."""


class Way(NamedTuple):
    """A method to compare, applied to the first of the images."""

    name: str
    by: str
    run: Callable[[], Outcome]


class PeerResult(NamedTuple):
    """The result of the SciPy loop for one image.

    Attributes:
        x_adv: The nearest adversarial image seen, or the image itself if none was.
        success: Whether one was found.
        distortion: Its RMS distance from the image; infinite if none was found.
        num_evals: Evaluations of value and gradient.
    """

    x_adv: np.ndarray
    success: bool
    distortion: float
    num_evals: int


def scipy_lbfgs(
    logits_fn: LogitsFn, *, bisections: int = 20, c_range: tuple[float, float] = (1e-4, 1e2)
) -> Callable[[np.ndarray, int], PeerResult]:
    """The paper's attack with SciPy's L-BFGS-B: bisect c on a log scale, solve from x each time.

    Args:
        logits_fn: The model, of one example; compiled once. SciPy works in float64, and so should
            the model, or rounding costs its line searches many evaluations.
        bisections: How many values of c are tried.
        c_range: The ends of the search.

    Returns:
        `(x, target) -> PeerResult`, for the box [0, 1], squared L2 and cross-entropy.
    """

    def loss(x: Array, target: int) -> tuple[Array, Array]:
        logits = logits_fn(x)
        return losses.cross_entropy(logits, target), logits

    evaluate = jax.jit(jax.value_and_grad(loss, has_aux=True))
    predict = jax.jit(lambda x: jnp.argmax(logits_fn(x)))

    def attack(x: np.ndarray, target: int) -> PeerResult:
        origin = np.asarray(x, np.float64).ravel()
        num_evals = 0

        def image(flat: np.ndarray) -> Array:
            return jnp.asarray(flat.reshape(np.shape(x)))

        def solve(c: float) -> np.ndarray:
            def objective(flat: np.ndarray) -> tuple[Any, np.ndarray]:
                nonlocal num_evals
                num_evals += 1
                (value, _), grad = evaluate(image(flat), target)
                r = flat - origin
                return c * (r @ r) + float(value), 2 * c * r + np.asarray(grad, np.float64).ravel()

            return optimize.minimize(
                objective,
                origin,
                jac=True,
                method="L-BFGS-B",
                bounds=[(0, 1)] * origin.size,
                options={"maxiter": 500, "ftol": 1e-12, "gtol": 1e-8},
            ).x

        low, high = c_range
        best, distortion = origin, np.inf
        for _ in range(bisections):
            c = np.sqrt(low * high)
            candidate = solve(c)
            if int(predict(image(candidate))) == target:
                low = c
                rms = np.sqrt(np.mean((candidate - origin) ** 2))
                if rms < distortion:
                    best, distortion = candidate, rms
            else:
                high = c
        return PeerResult(
            best.reshape(np.shape(x)), bool(np.isfinite(distortion)), float(distortion), num_evals
        )

    return attack
