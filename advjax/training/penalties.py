"""Penalties on parameters, added to a training loss."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PyTree

from advjax import losses

Penalty = Callable[[PyTree[Array]], Float[Array, ""]]
"""What `fit` adds to its loss: a scalar function of the parameters."""


def weight_decay(lambdas: ArrayLike | Sequence[ArrayLike]) -> Penalty:
    """The quadratic penalty `sum_k lambda_k / 2 * sum(w_k**2)` over the kernels of a network.

    Conventions differ. With this one, FC10 reproduces the errors that the paper prints; a later
    account of the paper's training divides by the width of the layer instead of by two.

    Args:
        lambdas: One weight for all kernels, or one for each in the order of `jax.tree.leaves`:
            hidden1, hidden2, logits for `models.MLP()`.

    Returns:
        A function of the parameters. Their arrays of two or more axes are the kernels; biases and
        scales go free. It raises ValueError unless there is one lambda, or one for each kernel.

    Source: Szegedy et al. (2013), section 4.2.
    """

    def penalty(params: PyTree[Array]) -> Float[Array, ""]:
        kernels = {
            jax.tree_util.keystr(path, simple=True, separator="/"): leaf
            for path, leaf in jax.tree.leaves_with_path(params)
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
