"""Separates the parameters of a model, which are trained, from its other variables."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, PyTree


def split(params: PyTree) -> tuple[PyTree, PyTree]:
    """Split variables into the leaves that are trained and those that are not.

    The trained leaves are the floating arrays among the parameters. In the variables of a Flax
    Linen module, `{"params": ..., "batch_stats": ...}`, the parameters are the collection "params";
    in an NNX module or state, each `nnx.Param`; in any other pytree, all leaves.

    Args:
        params: The variables.

    Returns:
        Two pytrees `(trained, fixed)` like `params`, each with None in place of the leaves that are
        in the other.

    Raises:
        TypeError: If a leaf is not an array.
        ValueError: If no leaf is trained.
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
            "params: no leaf to train, expected at least one floating array; of a Flax module pass "
            'the variables, {"params": ..., ...}.'
        )
    return (
        jax.tree.map(lambda use, leaf: leaf if use else None, mask, params),
        jax.tree.map(lambda use, leaf: None if use else leaf, mask, params),
    )


def join(trained: PyTree, fixed: PyTree) -> PyTree:
    """Undo `split`.

    Args:
        trained: A pytree with None in place of the leaves that are in `fixed`.
        fixed: A pytree with None in place of the leaves that are in `trained`.

    Returns:
        The pytree with all leaves.
    """
    return jax.tree.map(
        lambda a, b: b if a is None else a, trained, fixed, is_leaf=lambda node: node is None
    )


def replace(params: PyTree, updates: Any) -> PyTree:
    """Replace collections that are not trained by the means of their updates over a batch.

    Args:
        params: The variables of a Flax Linen module.
        updates: New values of collections by name, with a leading batch axis.

    Returns:
        The variables; updated ones keep their dtypes.

    Raises:
        ValueError: If an update is not of a collection in `params` other than "params".
    """
    if isinstance(updates, Mapping) and not updates:
        return params
    collections = set(params) - {"params"} if isinstance(params, Mapping) else set()
    if not isinstance(updates, Mapping) or not set(updates) <= collections:
        names = sorted(updates) if isinstance(updates, Mapping) else type(updates).__name__
        raise ValueError(
            f"apply: updates of {names}, expected collections among {sorted(collections)}, as "
            '"params" are trained; name only these as mutable=[...] in model.apply.'
        )

    def mean(new: Array, old: Array) -> Array:
        # An integer, such as a counter, is the same for all examples; a mean could round it.
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
