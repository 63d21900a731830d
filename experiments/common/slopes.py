"""Lower estimates of the norm of a layer, and of the slope of a network."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from advjax import lipschitz

Layer = lipschitz.Dense | lipschitz.Conv


def input_like(layer: Layer) -> jax.ShapeDtypeStruct:
    """The shape of a layer's input."""
    return jax.ShapeDtypeStruct(layer.input_shape, layer.kernel.dtype)


@functools.partial(jax.jit, static_argnums=0)
def estimate(method: Callable[..., lipschitz.Estimate], layer: Layer) -> Float[Array, ""]:
    """Estimate the norm of a layer from below, by power iteration or Lanczos from one start."""
    return method(layer.apply, input_like(layer), key=jax.random.key(0), num_starts=1).value


@jax.jit
def steepest(logits_fn: Callable, inputs: Float[Array, "n *shape"]) -> Float[Array, ""]:
    """Estimate the largest norm of the Jacobians at the inputs from below."""

    def slope(x: Array) -> Array:
        _, jacobian = jax.linearize(logits_fn, x)
        key = jax.random.key(0)
        return lipschitz.lanczos(jacobian, x, key=key, num_starts=1, num_steps=10).value

    return jnp.max(jax.lax.map(slope, inputs))
