"""The paper's classifier on the code of a sparse autoencoder."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import ArrayLike
from jaxtyping import Array, Float


class AutoencoderClassifier(nn.Module):
    """Softmax regression on the code of a sigmoid autoencoder, the paper's AE400-10.

    Train the encoder and the decoder first, to reconstruct images from a sparse code, and then the
    softmax on that code. The input is ONE example of any shape; use `jax.vmap` for a batch:

        model = AutoencoderClassifier()
        params = model.init(key, image)
        logits = model.apply(params, image)
        outputs = model.apply(params, image, method="layers")
        error = jnp.mean((outputs["reconstruction"] - image) ** 2)

    Attributes:
        code: The width of the code.
        classes: Number of classes.

    Reference: Szegedy et al. (2013), section 4.2.
    """

    code: int = 400
    classes: int = 10

    @nn.compact
    def layers(self, x: Float[ArrayLike, "*shape"]) -> dict[str, Float[Array, "..."]]:
        """Compute the outputs "code_preactivation", "code", "reconstruction" and "logits".

        The reconstruction has the shape of the image, with pixels in [0, 1]. The parameters belong
        to "encoder", "decoder" and "logits".
        """
        x = jnp.asarray(x)
        z = nn.Dense(self.code, name="encoder")(jnp.ravel(x))
        code = jax.nn.sigmoid(z)
        decoded = jax.nn.sigmoid(nn.Dense(x.size, name="decoder")(code))
        return {
            "code_preactivation": z,
            "code": code,
            "reconstruction": decoded.reshape(x.shape),
            "logits": nn.Dense(self.classes, name="logits")(code),
        }

    def __call__(self, x: Float[ArrayLike, "*shape"]) -> Float[Array, " classes"]:
        """Compute the logits of one example."""
        return self.layers(x)["logits"]
