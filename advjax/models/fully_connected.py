"""The paper's fully connected networks on MNIST."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float


class Softmax(nn.Module):
    """Softmax regression, the paper's FC10: one linear layer on the flattened image.

    It takes ONE example of any shape; use `jax.vmap` for a batch:

        model = Softmax()
        params = model.init(key, image)
        logits_fn = functools.partial(model.apply, params)

    Attributes:
        classes: How many classes.

    Source: Szegedy et al. (2013), section 4.2.
    """

    classes: int = 10

    @nn.compact
    def layers(self, x: Float[Array, "*shape"]) -> dict[str, Float[Array, " features"]]:
        """The output of each layer by its name, here only "logits"."""
        return {"logits": nn.Dense(self.classes, name="logits")(jnp.ravel(x))}

    def __call__(self, x: Float[Array, "*shape"]) -> Float[Array, " classes"]:
        """The logits of one example."""
        return self.layers(x)["logits"]


class MLP(nn.Module):
    """A multilayer perceptron, by default the paper's FC100-100-10.

    It takes ONE example of any shape; use `jax.vmap` for a batch. Ask for the outputs of the
    hidden layers by name:

        model = MLP()
        params = model.init(key, image)
        logits = model.apply(params, image)
        phi = model.apply(params, image, method="layers")["hidden2"]
        logits = model.apply(params, phi, after="hidden2")

    Attributes:
        features: The width of each layer; the last is the number of classes.
        activation: The elementwise function after every layer but the last.

    Source: Szegedy et al. (2013), section 4.2.
    """

    features: tuple[int, ...] = (100, 100, 10)
    activation: Callable[[Array], Array] = jax.nn.sigmoid

    @nn.compact
    def layers(
        self, x: Float[Array, "*shape"], *, after: str | None = None
    ) -> dict[str, Float[Array, " features"]]:
        """The output of each layer by its name: "hidden1", "hidden2", ..., "logits".

        Hidden outputs are taken after the activation, and before it as "hidden1_preactivation" and
        so on. Parameters are named by layer. With `after="hidden1"`, `x` is the output of that
        layer, and the outputs are those of the layers above.
        """
        return dense_layers(jnp.ravel(x), self.features, self.activation, after=after)

    def __call__(
        self, x: Float[Array, "*shape"], *, after: str | None = None
    ) -> Float[Array, " classes"]:
        """The logits of one example, or of a hidden layer's output with `after="hidden1"`."""
        return self.layers(x, after=after)["logits"]


def dense_layers(
    x: Float[Array, " inputs"],
    features: Sequence[int],
    activation: Callable[[Array], Array],
    *,
    after: str | None = None,
) -> dict[str, Float[Array, " features"]]:
    """The dense layers that end a classifier, and the outputs of each by their names.

    Call it inside a compact method: the layers belong to the module that it is called in.

    Args:
        x: The flat input.
        features: The width of each layer; the last is the number of classes.
        activation: The elementwise function after every layer but the last.
        after: The hidden layer whose output `x` is, if it is that of one.

    Returns:
        "hidden1_preactivation", "hidden1", and so on for each hidden layer above `x`, and "logits".

    Raises:
        ValueError: If there is no hidden layer of the name `after`.
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
