"""Penalties on parameters and on codes, added to a training loss."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PyTree

from advjax import losses
from advjax.training import variables

Penalty = Callable[[PyTree[Array]], Float[Array, ""]]
"""A term that `fit` adds to its loss: a scalar function of the parameters."""

BATCH = "batch"
"""The name of the axis over which `fit` maps the network and the loss."""


def weight_decay(lambdas: ArrayLike | Sequence[ArrayLike]) -> Penalty:
    """Make the quadratic penalty `sum_k lambda_k / 2 * sum(w_k**2)` over the kernels of a network.

    Conventions differ. With this one, FC10 reproduces the errors that the paper prints; a later
    account of the paper's training divides by the width of the layer instead of by two.

    Args:
        lambdas: One weight for all kernels, or one per kernel in the order of `jax.tree.leaves`:
            hidden1, hidden2, logits for `models.MLP()`.

    Returns:
        A function of the parameters. Among the arrays that `fit` trains, those with at least two
        axes are kernels; biases and scales are not penalised. It raises ValueError unless there is
        one lambda, or one per kernel.

    Reference: Szegedy et al. (2013), section 4.2.
    """

    def penalty(params: PyTree[Array]) -> Float[Array, ""]:
        kernels = {
            jax.tree_util.keystr(path, simple=True, separator="/"): leaf
            for path, leaf in jax.tree.leaves_with_path(variables.split(params)[0])
            if jnp.ndim(leaf) >= 2
        }
        weights = jnp.asarray(lambdas)
        if not kernels or weights.shape not in {(), (len(kernels),)}:
            raise ValueError(
                f"lambdas: shape {weights.shape} for {len(kernels)} kernels {list(kernels)}, "
                "expected a scalar, or one per kernel."
            )
        return jnp.sum(weights * jnp.stack([losses.squared_l2(w) for w in kernels.values()])) / 2

    return penalty


def sparsity(code: Float[Array, " features"], *, target: float = 0.05) -> Float[Array, ""]:
    """Penalise features whose mean activation over a batch differs from a small target.

    The penalty is the relative entropy `sum_j KL(target || mean of feature j over the batch)` of
    Bernoulli distributions, and is part of the loss of an autoencoder:

        def loss(outputs, image):
            error = losses.squared_l2(outputs["reconstruction"] - image)
            return error + training.sparsity(outputs["code"])

    Args:
        code: The code of ONE example, `(features,)` in [0, 1], inside a loss that `fit` maps over
            a batch.
        target: The mean activation wanted, in (0, 1).

    Returns:
        The penalty, in nats: the same for all examples of the batch, and so for their mean.

    Raises:
        NameError: Outside `jax.vmap(loss, axis_name="batch")`, which `fit` applies.
        ValueError: If `target` is not between 0 and 1.

    Reference: Ng (2011), Sparse autoencoder, CS294A lecture notes.
    """
    if not 0 < target < 1:
        raise ValueError(f"target: {target!r}, expected a number above 0 and below 1.")
    # A feature that is off, or on, for the whole batch has an infinite penalty.
    tiny = jnp.finfo(code.dtype).eps
    active = jnp.clip(jax.lax.pmean(code, BATCH), tiny, 1 - tiny)
    return jnp.sum(
        jax.scipy.special.rel_entr(target, active)
        + jax.scipy.special.rel_entr(1 - target, 1 - active)
    )
