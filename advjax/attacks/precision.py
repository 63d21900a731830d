"""The precision in which an attack evaluates a model, and the differences that it resolves.

By default accelerators round the factors of float32 products, to 10 bits (TensorFloat-32) or to 7
(bfloat16). A search for the decision boundary cannot converge in this noise, so that an attack
evaluates the model in full precision, unless `jax_default_matmul_precision` is set. The image
should still be adversarial when the model is evaluated as usual, so that the margin allows for the
rounding.
"""

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_RESOLUTION = 2e-5  # of the spread of the logits: more than float32's rounding in any batch
_OF_TENSORFLOAT = 1e-3
_OF_BFLOAT = 4e-3
_ROUNDINGS = 4  # of the largest logit: what their own dtype keeps apart
_FAR_BELOW = 30  # times as far below the largest logit as the target: a class that does not matter
_FULL = ("highest", "float32", "F32_F32_F32", "F64_F64_F64")


def full_unless_chosen() -> contextlib.AbstractContextManager:
    """A context that traces products in full precision, unless the user has chosen a precision."""
    if _chosen() is None and jax.default_backend() != "cpu":
        return jax.default_matmul_precision("highest")
    return contextlib.nullcontext()


def resolution(
    logits: Float[Array, " classes"], target: Int[Array, ""], dtype: Any
) -> Float[Array, ""]:
    """Compute the smallest difference of logits that counts, from those of the clean image.

    A fraction of their spread, but of classes that the search may meet: a masked class, at minus
    infinity or at -1e9, is none. And never less than rounding, where a large constant is added to
    all logits, or they are in half precision.

    Args:
        logits: Logits of the clean image.
        target: The class to reach.
        dtype: The dtype that the model returns them in.

    Returns:
        The difference, at least 0.
    """
    finite = jnp.isfinite(logits)
    largest = jnp.max(logits, initial=-jnp.inf, where=finite)
    below = jnp.where(finite, largest - logits, jnp.inf)
    second = jnp.min(jnp.where(jnp.arange(len(below)) == jnp.argmin(below), jnp.inf, below))
    aim = jnp.where(finite[target], below[target], 0)
    reach = jnp.maximum(aim, jnp.where(jnp.isfinite(second), second, 0))
    spread = jnp.max(below, initial=0, where=below <= _FAR_BELOW * reach)
    magnitude = jnp.maximum(jnp.abs(largest), jnp.abs(largest - aim))
    rounding = _ROUNDINGS * float(jnp.finfo(dtype).eps) * magnitude
    difference = jnp.maximum(_fraction(dtype) * spread, rounding)
    return jnp.where(jnp.isfinite(difference), difference, 0)


def _fraction(dtype: Any) -> float:
    """The smallest difference that another evaluation keeps, as a fraction of the spread."""
    if jnp.finfo(dtype).bits > 32:
        return _RESOLUTION
    chosen, backend = _chosen(), jax.default_backend()
    if chosen in _FULL or (chosen is None and backend == "cpu"):
        return _RESOLUTION
    if backend == "tpu" or (chosen is not None and "bf" in chosen.lower()):
        return _OF_BFLOAT
    return _OF_TENSORFLOAT


def _chosen() -> str | None:
    """The user's `jax_default_matmul_precision`."""
    chosen = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    return None if chosen in (None, "default") else str(chosen)
