"""Training towards small Lipschitz bounds."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Key, PyTree

from advjax import checks, losses
from advjax.lipschitz import Conv, Dense, linear_layers, power_step

Vectors = list[Float[Array, "blocks *shape"]]


class LipschitzState(NamedTuple):
    """The state of `lipschitz_penalty` between steps.

    Attributes:
        vectors: For each linear layer, estimates of its top right singular vectors.
        log_product: The logarithm of the product of the layers' norms, estimated with them.
    """

    vectors: Vectors
    log_product: Float[Array, ""]


def lipschitz_penalty(
    weight: float,
    apply: Callable[[PyTree[Array], Float[Array, "*shape"]], Array],
    like: Float[ArrayLike, "*shape"] | jax.ShapeDtypeStruct,
    *,
    num_steps: int = 1,
) -> optax.GradientTransformation:
    """Penalise the logarithm of the product of a network's layer norms, as the paper suggests.

    It adds the gradient of `weight * sum_k log |W_k|` to that of the loss, over all dense layers
    and convolutions, each with its strides and padding. The norms are estimated by power iteration,
    a few steps per update from the vectors of the last one, which costs little more than a few
    images cost the network. Chain it before an optimizer:

        optax.chain(lipschitz_penalty(1e-3, model.apply, images[0]), optax.adam(1e-3))

    Args:
        weight: The weight of the penalty, at least 0.
        apply: The network, `(params, x) -> output` of one input, as for `fit`.
        like: An input, or a `jax.ShapeDtypeStruct`.
        num_steps: Number of steps of power iteration per update.

    Returns:
        A gradient transformation whose state holds the vectors; its `update` needs the parameters.

    Raises:
        ValueError: If `weight` is negative, `num_steps` is not a positive integer, or the network
            has no layer with a norm.

    Reference: Szegedy et al. (2013), section 4.3; Yoshida and Miyato (2017) for the vectors.
    """
    weight = checks.number("weight", weight, minimum=0)
    num_steps = checks.positive_int("num_steps", num_steps)

    def layers(params: Any) -> list[Dense | Conv]:
        found = linear_layers(lambda x: apply(params, x), like)
        if not found:
            raise ValueError("apply: has no dense layer and no convolution to penalise.")
        return found

    def log_product(params: Any, vectors: Vectors) -> Float[Array, ""]:
        each = zip(layers(params), vectors, strict=True)
        stretch = jax.vmap(lambda layer, v: losses.l2(layer.apply(v)))
        lengths = jnp.stack([jnp.max(stretch(layer, v)) for layer, v in each])
        # A layer of zeros has no logarithm; the floor gives it a gradient of 0.
        return jnp.sum(jnp.log(jnp.maximum(lengths, jnp.finfo(lengths.dtype).tiny)))

    def iterate(params: Any, vectors: Vectors, steps: int) -> Vectors:
        each = zip(layers(jax.lax.stop_gradient(params)), vectors, strict=True)
        turn = jax.vmap(lambda layer, v: power_step(layer.apply, v, num_steps=steps))
        return [turn(layer, v) for layer, v in each]

    def init(params: Any) -> LipschitzState:
        found = layers(params)
        keys = jax.random.split(jax.random.key(0), len(found))

        def draw(layer: Dense | Conv, key: Key[Array, ""]) -> Float[Array, "*shape"]:
            return jax.random.normal(key, layer.input_shape, layer.kernel.dtype)

        vectors = [
            jax.vmap(draw)(layer, jax.random.split(key, len(layer.kernel)))
            for layer, key in zip(found, keys, strict=True)
        ]
        vectors = iterate(params, vectors, 10)
        return LipschitzState(vectors, log_product(params, vectors))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, LipschitzState]:
        if params is None:
            raise ValueError("params: None, expected the parameters; pass them to `update`.")
        vectors = iterate(params, state.vectors, num_steps)
        value, gradient = jax.value_and_grad(log_product)(params, vectors)
        updates = jax.tree.map(lambda u, g: u + weight * g, updates, gradient)
        return updates, LipschitzState(vectors, value)

    return optax.GradientTransformation(init, update)
