"""Callables as arguments of a compiled function: what they hold that is an array, and the rest."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import Array


class Static:
    """A callable without its arrays: what a compiled program is looked up by."""

    def __init__(self, treedef: Any, leaves: tuple):
        self.treedef, self.leaves = treedef, leaves
        self._hash = hash((treedef, leaves))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        # The hashes first: trees of unlike metadata may refuse to be compared.
        return (
            isinstance(other, Static)
            and self._hash == other._hash
            and self.leaves == other.leaves
            and self.treedef == other.treedef
        )


class _ById:
    def __init__(self, fun: Callable):
        self.fun = fun

    def __hash__(self) -> int:
        return id(self.fun)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ById) and self.fun is other.fun


_ARRAY = object()  # the place of an array among the leaves


def split(fun: Callable) -> tuple[Static, list[Array]]:
    """Split a callable into something hashable and the arrays of a callable pytree.

    Args:
        fun: A function, a `functools.partial`, a `jax.tree_util.Partial`, an Equinox module, ...

    Returns:
        The static part, equal for equal functions, and the arrays. A callable that cannot be hashed
        is known by its identity.
    """
    tree: Any = fun
    if type(fun) is functools.partial:
        tree = jax.tree_util.Partial(fun.func, *fun.args, **fun.keywords)
    leaves, treedef = jax.tree.flatten(tree)
    arrays = [leaf for leaf in leaves if _is_array(leaf)]
    rest = tuple(_ARRAY if _is_array(leaf) else leaf for leaf in leaves)
    try:
        return Static(treedef, rest), arrays
    except TypeError:
        return Static(None, (_ById(fun),)), []


def join(static: Static, arrays: list[Array]) -> Callable:
    """Put a callable together again."""
    if static.treedef is None:
        return static.leaves[0].fun
    remaining = iter(arrays)
    leaves = [next(remaining) if leaf is _ARRAY else leaf for leaf in static.leaves]
    return jax.tree.unflatten(static.treedef, leaves)


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray)
