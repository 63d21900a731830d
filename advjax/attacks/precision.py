"""The precision in which an attack computes a model, and what that keeps apart.

By default accelerators round the factors of float32 products, to 10 bits (TensorFloat-32) or to 7
(bfloat16). A search for the decision boundary cannot converge in that noise, so an attack computes
the model in full precision, unless `jax_default_matmul_precision` is set. The image should still be
adversarial for a model that is computed as usual, and so the margin allows for the rounding.
"""

import contextlib
from typing import Any

import jax
import jax.numpy as jnp

_RESOLUTION = 2e-5  # of the spread of the logits: what float32 keeps apart in any batch
_OF_TENSORFLOAT = 1e-3
_OF_BFLOAT = 4e-3
_FULL = ("highest", "float32", "F32_F32_F32", "F64_F64_F64")


def full_unless_chosen() -> contextlib.AbstractContextManager:
    """A context in which products are traced in full precision, if the user has chosen none."""
    if _chosen() is None and jax.default_backend() != "cpu":
        return jax.default_matmul_precision("highest")
    return contextlib.nullcontext()


def resolution(dtype: Any) -> float:
    """Return the smallest difference of logits that survives, as a fraction of their spread.

    Args:
        dtype: That of the logits.
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
