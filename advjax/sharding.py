"""Values inside `jax.shard_map`."""

from typing import Any, TypeVar

import jax

T = TypeVar("T")


def vary_like(tree: T, like: Any) -> T:
    """Return `tree` with every leaf varying over the mesh axes that any leaf of `like` varies over.

    Inside `jax.shard_map` a loop must carry the same type around: a state that begins with zeros,
    equal on all devices, has to be declared as different on each before it meets a device's image.
    Elsewhere this does nothing.
    """
    axes = frozenset[str]().union(*map(_varying_axes, jax.tree.leaves(like)))

    def vary(leaf):
        missing = tuple(axes - _varying_axes(leaf))
        return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(vary, tree)


def _varying_axes(leaf: Any) -> frozenset[str]:
    return getattr(jax.typeof(leaf), "vma", frozenset())
