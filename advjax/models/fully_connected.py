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

    Attributes:
        features: The width of each layer; the last is the number of classes.
        activation: The elementwise function after every layer but the last.

    Source: Szegedy et al. (2013), section 4.2.
    """

    features: tuple[int, ...] = (100, 100, 10)
    activation: Callable[[Array], Array] = jax.nn.sigmoid

    @nn.compact
    def layers(self, x: Float[Array, "*shape"]) -> dict[str, Float[Array, " features"]]:
        """The output of each layer by its name: "hidden1", "hidden2", ..., "logits".

        Hidden outputs are taken after the activation, and before it as "hidden1_preactivation" and
        so on. Parameters are named by layer.
        """
        return dense_layers(jnp.ravel(x), self.features, self.activation)

    def __call__(self, x: Float[Array, "*shape"]) -> Float[Array, " classes"]:
        """The logits of one example."""
        return self.layers(x)["logits"]


def dense_layers(
    x: Float[Array, " inputs"], features: Sequence[int], activation: Callable[[Array], Array]
) -> dict[str, Float[Array, " features"]]:
    """The dense layers that end a classifier, and the outputs of each by their names.

    Call it inside a compact method: the layers belong to the module that it is called in.

    Args:
        x: The flat input.
        features: The width of each layer; the last is the number of classes.
        activation: The elementwise function after every layer but the last.

    Returns:
        "hidden1_preactivation", "hidden1", and so on for each hidden layer, and "logits".
    """
    outputs: dict[str, Array] = {}
    *hidden, classes = features
    for i, width in enumerate(hidden, start=1):
        z = nn.Dense(width, name=f"hidden{i}")(x)
        x = activation(z)
        outputs |= {f"hidden{i}_preactivation": z, f"hidden{i}": x}
    return outputs | {"logits": nn.Dense(classes, name="logits")(x)}
