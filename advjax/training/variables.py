"""Which leaves of a model's variables are trained."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, PyTree


def split(params: PyTree) -> tuple[PyTree, PyTree]:
    """Split variables into the leaves that are trained and those that stay as they are.

    Trained are floating arrays that are parameters. Of the variables of a Flax Linen module,
    `{"params": ..., "batch_stats": ...}`, these are in the collection "params"; of an NNX module
    or state, in an `nnx.Param`; of any other pytree, all floating arrays.

    Args:
        params: The variables.

    Returns:
        Two pytrees, `(trained, fixed)`, of the structure of `params`, each with None in the places
        of the other.

    Raises:
        TypeError: If a leaf is no array.
        ValueError: If there is nothing to train.
    """

    def trained(path: tuple[Any, ...], node: Any) -> PyTree:
        if isinstance(node, nnx.Variable):
            is_parameter = isinstance(node, nnx.Param)
            return jax.tree.map(lambda leaf: is_parameter and _is_floating(path, leaf), node)
        collection = getattr(path[0], "key", None) if path else None
        return _is_floating(path, node) and not (is_linen and collection != "params")

    is_linen = isinstance(params, Mapping) and "params" in params
    is_linen = is_linen and not isinstance(params, nnx.State)
    mask = jax.tree.map_with_path(
        trained, params, is_leaf=lambda node: isinstance(node, nnx.Variable)
    )
    if not any(jax.tree.leaves(mask)):
        raise ValueError(
            "params: no leaf to train, expected at least one floating array; of Flax variables "
            'pass all, {"params": ...} included.'
        )
    return (
        jax.tree.map(lambda use, leaf: leaf if use else None, mask, params),
        jax.tree.map(lambda use, leaf: None if use else leaf, mask, params),
    )


def join(trained: PyTree, fixed: PyTree) -> PyTree:
    """Undo `split`.

    Args:
        trained: A pytree with None in the places of `fixed`.
        fixed: A pytree with None in the places of `trained`.

    Returns:
        The pytree with all leaves.
    """
    return jax.tree.map(
        lambda a, b: b if a is None else a, trained, fixed, is_leaf=lambda node: node is None
    )


def replace(params: PyTree, updates: Any) -> PyTree:
    """Replace collections of a Flax Linen module that are not trained by means over a batch.

    Args:
        params: The variables.
        updates: New collections by their names, with a leading batch axis.

    Returns:
        The variables, each new one in the dtype of the old.

    Raises:
        ValueError: If an update is of anything but a collection that is there and is not trained.
    """
    if isinstance(updates, Mapping) and not updates:
        return params
    collections = set(params) - {"params"} if isinstance(params, Mapping) else set()
    if not isinstance(updates, Mapping) or not set(updates) <= collections:
        names = sorted(updates) if isinstance(updates, Mapping) else type(updates).__name__
        raise ValueError(
            f"apply: updates of {names}, expected some of the collections {sorted(collections)} of "
            "params that are not trained; pass those alone as `mutable` to the module's apply."
        )

    def mean(new: Array, old: Array) -> Array:
        # Integers, such as a counter, are those of the first example: all examples have the same.
        new = jnp.mean(new, axis=0) if jnp.issubdtype(new.dtype, jnp.inexact) else new[0]
        return new.astype(old.dtype)

    return {**params, **{name: jax.tree.map(mean, updates[name], params[name]) for name in updates}}


def _is_floating(path: tuple[Any, ...], leaf: Any) -> bool:
    if not isinstance(leaf, jax.Array | np.ndarray | np.generic):
        raise TypeError(
            f"params: {type(leaf).__name__} at {jax.tree_util.keystr(path) or 'the root'}, "
            "expected arrays; convert a number that is to be trained with jnp.asarray, and an "
            "Equinox module with eqx.partition(model, eqx.is_inexact_array)."
        )
    return bool(jnp.issubdtype(leaf.dtype, jnp.floating))
