"""Penalties on parameters and on codes, added to a training loss."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PyTree

from advjax import losses
from advjax.training import variables

Penalty = Callable[[PyTree[Array]], Float[Array, ""]]
"""What `fit` adds to its loss: a scalar function of the parameters."""

BATCH = "batch"
"""The axis that `fit` maps its loss over."""


def weight_decay(lambdas: ArrayLike | Sequence[ArrayLike]) -> Penalty:
    """The quadratic penalty `sum_k lambda_k / 2 * sum(w_k**2)` over the kernels of a network.

    Conventions differ. With this one, FC10 reproduces the errors that the paper prints; a later
    account of the paper's training divides by the width of the layer instead of by two.

    Args:
        lambdas: One weight for all kernels, or one for each in the order of `jax.tree.leaves`:
            hidden1, hidden2, logits for `models.MLP()`.

    Returns:
        A function of the parameters. Of the arrays that `fit` trains, those of two or more axes are
        the kernels; biases and scales go free. It raises ValueError unless there is one lambda, or
        one for each kernel.

    Source: Szegedy et al. (2013), section 4.2.
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
                "expected a scalar or one for each kernel."
            )
        return jnp.sum(weights * jnp.stack([losses.squared_l2(w) for w in kernels.values()])) / 2

    return penalty


def sparsity(code: Float[Array, " features"], *, target: float = 0.05) -> Float[Array, ""]:
    """How far the features of a code are from being active on a small share of a batch each.

    It is the relative entropy `sum_j KL(target || mean of feature j over the batch)` of Bernoulli
    distributions, and belongs in the loss of an autoencoder:

        def loss(outputs, image):
            error = losses.squared_l2(outputs["reconstruction"] - image)
            return error + training.sparsity(outputs["code"])

    Args:
        code: Of ONE example, with features in [0, 1], inside a loss that `fit` maps over a batch.
        target: The share.

    Returns:
        The same scalar for all examples of the batch, and so for their mean.

    Raises:
        NameError: Outside of `jax.vmap(loss, axis_name="batch")`, which `fit` applies.
        ValueError: If `target` is not between 0 and 1.

    Source: Ng (2011), Sparse autoencoder, CS294A lecture notes.
    """
    if not 0 < target < 1:
        raise ValueError(f"target: {target!r}, expected a share above 0 and below 1.")
    tiny = jnp.finfo(code.dtype).eps
    share = jnp.clip(jax.lax.pmean(code, BATCH), tiny, 1 - tiny)
    return jnp.sum(
        target * jnp.log(target / share) + (1 - target) * jnp.log((1 - target) / (1 - share))
    )
