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

_RESOLUTION = 2e-5  # of the spread of the logits: more than float32's rounding in any batch
_OF_TENSORFLOAT = 1e-3
_OF_BFLOAT = 4e-3
_FULL = ("highest", "float32", "F32_F32_F32", "F64_F64_F64")


def full_unless_chosen() -> contextlib.AbstractContextManager:
    """A context that traces products in full precision, unless the user has chosen a precision."""
    if _chosen() is None and jax.default_backend() != "cpu":
        return jax.default_matmul_precision("highest")
    return contextlib.nullcontext()


def resolution(dtype: Any) -> float:
    """Return the smallest difference of logits that survives, as a fraction of their spread.

    Args:
        dtype: The dtype of the logits.

    Returns:
        The fraction.
    """
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
