"""Operator norms of layers, between a certified bound and an estimate from below."""

import math
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from advjax.lipschitz.linear.lanczos import Pair, top_pair
from advjax.lipschitz.linear.rounding import power_of_two


class NormBound(NamedTuple):
    """Bounds of an operator norm.

    Attributes:
        lower: The length of the image of a unit vector that the Lanczos method found; a lower bound
            up to rounding.
        upper: A certified upper bound, rounding included; infinite if the kernel is not finite.
    """

    lower: Float[Array, ""]
    upper: Float[Array, ""]


@runtime_checkable
class LinearLayer(Protocol):
    """The interface of a layer: a pytree whose leaf is its kernel."""

    @property
    def kernel(self) -> Float[Array, "*kernel"]:
        """The kernel."""

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one input."""

    def apply(self, x: Float[Array, "*shape"]) -> Float[Array, "*out"]:
        """Apply the layer to one input."""

    def certified(self) -> Float[Array, ""]:
        """An upper bound of the operator norm."""


def between(layer: LinearLayer) -> NormBound:
    """Bound the operator norm of a layer from both sides."""
    kernel = layer.kernel
    if not kernel.size or not math.prod(layer.input_shape):
        return NormBound(jnp.zeros((), kernel.dtype), jnp.zeros((), kernel.dtype))
    return NormBound(_lower_norm(layer), upper_norm(layer))


@jax.custom_jvp
@jax.jit
def upper_norm(layer: LinearLayer) -> Float[Array, ""]:
    """The certified bound alone, with the gradient of the norm times its ratio to the norm.

    The gradient of the certified bound itself would be that of eight squarings.
    """
    return layer.certified()


@upper_norm.defjvp
def _upper_norm_jvp(primals, tangents):
    upper, lower = upper_norm(*primals), _lower_norm(*primals)
    _, slope = jax.jvp(_lower_norm, primals, tangents)
    usable = (lower > 0) & jnp.isfinite(upper)  # a kernel of zeros has no direction
    return upper, slope * jnp.where(usable, upper / jnp.where(usable, lower, 1), 0)


@jax.custom_jvp
def _lower_norm(layer: LinearLayer) -> Float[Array, ""]:
    return _top_pair(layer).value


@_lower_norm.defjvp
def _lower_norm_jvp(primals, tangents):
    pair = _top_pair(*primals)
    # u^T A v is the norm and, with the unit vectors u and v held fixed, has its gradient.
    return pair.value, jnp.sum(pair.left * tangents[0].apply(pair.right))


@jax.jit
def _top_pair(layer: LinearLayer) -> Pair:
    # Scaled, so that the lengths of what it makes neither underflow nor overflow.
    scale = power_of_two(layer.kernel)
    scaled = jax.tree.map(lambda kernel: kernel / scale, layer)
    like = jax.ShapeDtypeStruct(layer.input_shape, layer.kernel.dtype)
    pair = top_pair(scaled.apply, like)
    return pair._replace(value=pair.value * scale)
