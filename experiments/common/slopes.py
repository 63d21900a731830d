"""Lower estimates of the norm of a layer, and of the slope of a network."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from advjax import lipschitz
from advjax.lipschitz.convolution import Convolution
from advjax.lipschitz.norms import Dense

Linear = Dense | Convolution


def input_like(layer: Linear, kernel: Float[Array, "*kernel"]) -> jax.ShapeDtypeStruct:
    """The shape of a layer's input."""
    return jax.ShapeDtypeStruct(layer.input_shape(kernel.shape), kernel.dtype)


@functools.partial(jax.jit, static_argnums=(0, 1))
def estimate(
    method: Callable[..., lipschitz.Estimate], layer: Linear, kernel: Float[Array, "*kernel"]
) -> Float[Array, ""]:
    """Estimate the norm of a layer from below, by power iteration or Lanczos from one start."""
    apply, like = functools.partial(layer.apply, kernel), input_like(layer, kernel)
    return method(apply, like, key=jax.random.key(0), num_starts=1).value


@jax.jit
def steepest(logits_fn: Callable, inputs: Float[Array, "n *shape"]) -> Float[Array, ""]:
    """Estimate the largest norm of the Jacobians at the inputs from below."""

    def slope(x: Array) -> Array:
        _, jacobian = jax.linearize(logits_fn, x)
        key = jax.random.key(0)
        return lipschitz.lanczos(jacobian, x, key=key, num_starts=1, num_steps=10).value

    return jnp.max(jax.lax.map(slope, inputs))
