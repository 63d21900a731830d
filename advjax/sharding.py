"""Meshes in the context of a call."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, PartitionSpec

T = TypeVar("T")


def automatic(fn: Callable[..., T]) -> Callable[..., T]:
    """Return `fn` computed with automatic sharding, where the mesh of the context is explicit.

    The vmapped loops of an attack mix sharded images and unsharded constants, which explicit
    sharding does not allow. The results are sharded as the arguments are over the axes of
    `jax.vmap`, and not within one example.
    """

    @functools.wraps(fn)
    def wrapped(*args: Any) -> T:
        if AxisType.Explicit not in jax.sharding.get_abstract_mesh().axis_types:
            return fn(*args)
        return jax.sharding.auto_axes(fn, out_sharding=PartitionSpec())(*args)

    return wrapped


def no_mesh() -> contextlib.AbstractContextManager:
    """A context without the mesh that the caller may have set."""
    return jax.set_mesh(Mesh(np.empty((), object), ()))


def vary_like(tree: T, like: Any) -> T:
    """Return `tree` with every leaf varying over the mesh axes that any leaf of `like` varies over.

    Inside `jax.shard_map` the type of a loop's carry must not change: an initial state of zeros,
    equal on all devices, must be declared as varying before the loop mixes it with a device's
    image. Elsewhere this does nothing.
    """
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return tree
    # In every version of JAX a value varies over the axes of what it is computed from. XLA removes
    # the computation.
    never = functools.reduce(jnp.logical_or, map(_never, jax.tree.leaves(like)), jnp.bool_(False))
    return jax.tree.map(lambda leaf: jnp.where(never, jnp.zeros_like(leaf), leaf), tree)


def _never(leaf: Any) -> Any:
    """False, computed from `leaf`."""
    first = leaf[(0,) * jnp.ndim(leaf)] if jnp.ndim(leaf) else leaf
    return jnp.equal(first, first) & False
