"""The paper's fully connected networks on MNIST."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import ArrayLike
from jaxtyping import Array, Float


class Softmax(nn.Module):
    """Softmax regression, the paper's FC10: one linear layer on the flattened image.

    The input is ONE example of any shape; use `jax.vmap` for a batch:

        model = Softmax()
        params = model.init(key, image)
        logits_fn = functools.partial(model.apply, params)

    Attributes:
        classes: Number of classes.

    Reference: Szegedy et al. (2013), section 4.2.
    """

    classes: int = 10

    @nn.compact
    def layers(self, x: Float[ArrayLike, "*shape"]) -> dict[str, Float[Array, " features"]]:
        """Compute the output of each layer by name; here the only one is "logits"."""
        return {"logits": nn.Dense(self.classes, name="logits")(jnp.ravel(x))}

    def __call__(self, x: Float[ArrayLike, "*shape"]) -> Float[Array, " classes"]:
        """Compute the logits of one example."""
        return self.layers(x)["logits"]


class MLP(nn.Module):
    """A multilayer perceptron, by default the paper's FC100-100-10.

    The input is ONE example of any shape; use `jax.vmap` for a batch. The outputs of the hidden
    layers have names:

        model = MLP()
        params = model.init(key, image)
        logits = model.apply(params, image)
        phi = model.apply(params, image, method="layers")["hidden2"]
        logits = model.apply(params, phi, after="hidden2")

    Attributes:
        features: The width of each layer; the last is the number of classes.
        activation: The elementwise function after every layer but the last.

    Reference: Szegedy et al. (2013), section 4.2.
    """

    features: tuple[int, ...] = (100, 100, 10)
    activation: Callable[[Array], Array] = jax.nn.sigmoid

    @nn.compact
    def layers(
        self, x: Float[ArrayLike, "*shape"], *, after: str | None = None
    ) -> dict[str, Float[Array, " features"]]:
        """Compute the output of each layer by name: "hidden1", "hidden2", ..., "logits".

        "hidden1" is the output after the activation, "hidden1_preactivation" before it. Parameters
        are named by layer. With `after="hidden1"`, `x` is the output of that layer, and only the
        layers above it are computed.
        """
        return dense_layers(jnp.ravel(x), self.features, self.activation, after=after)

    def __call__(
        self, x: Float[ArrayLike, "*shape"], *, after: str | None = None
    ) -> Float[Array, " classes"]:
        """Compute the logits of one example; with `after="hidden1"`, of that layer's output."""
        return self.layers(x, after=after)["logits"]


def dense_layers(
    x: Float[Array, " inputs"],
    features: Sequence[int],
    activation: Callable[[Array], Array],
    *,
    after: str | None = None,
) -> dict[str, Float[Array, " features"]]:
    """Apply the dense layers at the end of a classifier, and return their outputs by name.

    Call it inside a compact method: the layers become submodules of the calling module.

    Args:
        x: The input, flat.
        features: The width of each layer; the last is the number of classes.
        activation: The elementwise function after every layer but the last.
        after: The hidden layer whose output `x` is; None if `x` is the input of the first.

    Returns:
        "hidden1_preactivation", "hidden1", and so on for each hidden layer above `x`, and "logits".

    Raises:
        ValueError: If no hidden layer is called `after`.
    """
    outputs: dict[str, Array] = {}
    *widths, classes = features
    names = [f"hidden{i}" for i in range(1, len(features))]
    if after is not None and after not in names:
        raise ValueError(f"after: {after!r}, expected one of {', '.join(names)}, or None.")
    first = 0 if after is None else names.index(after) + 1
    for name, width in zip(names[first:], widths[first:], strict=True):
        z = nn.Dense(width, name=name)(x)
        x = activation(z)
        outputs |= {f"{name}_preactivation": z, name: x}
    return outputs | {"logits": nn.Dense(classes, name="logits")(x)}
