"""The paper's classifier on the code of an autoencoder."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float


class AutoencoderClassifier(nn.Module):
    """Softmax regression on the code of a sigmoid autoencoder, the paper's AE400-10.

    The encoder and the decoder are meant to be trained to reconstruct images with a sparse code,
    and the softmax afterwards on the code as it is then. It takes ONE example of any shape; use
    `jax.vmap` for a batch:

        model = AutoencoderClassifier()
        params = model.init(key, image)
        logits = model.apply(params, image)
        outputs = model.apply(params, image, method="layers")
        error = jnp.mean((outputs["reconstruction"] - image) ** 2)

    Attributes:
        code: The width of the code.
        classes: How many classes.

    Source: Szegedy et al. (2013), section 4.2.
    """

    code: int = 400
    classes: int = 10

    @nn.compact
    def layers(self, x: Float[Array, "*shape"]) -> dict[str, Float[Array, "..."]]:
        """The output of each layer: "code_preactivation", "code", "reconstruction", "logits".

        The reconstruction has the shape of the image, with pixels in [0, 1]. The parameters are
        those of "encoder", "decoder" and "logits".
        """
        z = nn.Dense(self.code, name="encoder")(jnp.ravel(x))
        code = jax.nn.sigmoid(z)
        decoded = jax.nn.sigmoid(nn.Dense(x.size, name="decoder")(code))
        return {
            "code_preactivation": z,
            "code": code,
            "reconstruction": decoded.reshape(x.shape),
            "logits": nn.Dense(self.classes, name="logits")(code),
        }

    def __call__(self, x: Float[Array, "*shape"]) -> Float[Array, " classes"]:
        """The logits of one example."""
        return self.layers(x)["logits"]
