"""The variables of `minimize` and their bounds: pytrees outside, one vector inside."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from advjax import checks
from advjax.types import Box

_LEAF: Any = jax.tree.structure(0)


class Layout(NamedTuple):
    """How a pytree of arrays lies in a vector; hashable."""

    treedef: Any
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[Any, ...]

    @property
    def dtype(self) -> Any:
        """That of the vector: float32 at least, whatever the variables are rounded to."""
        return jnp.result_type(*self.dtypes, jnp.float32)

    def flatten(self, tree: PyTree[Array], *, batched: bool = False) -> Float[Array, "*batch n"]:
        """Lay a pytree of this structure into a vector, or a batch of them into as many."""
        leaves = [jnp.asarray(leaf, self.dtype) for leaf in self.treedef.flatten_up_to(tree)]
        if batched:
            return jnp.concatenate([leaf.reshape(len(leaf), -1) for leaf in leaves], axis=1)
        return jnp.concatenate([jnp.ravel(leaf) for leaf in leaves])

    def unflatten(self, vector: Float[Array, "*batch n"]) -> PyTree[Array]:
        """Take the pytree out of the last axis of a vector."""
        leaves, start, batch = [], 0, vector.shape[:-1]
        for shape, dtype in zip(self.shapes, self.dtypes, strict=True):
            end = start + math.prod(shape)
            leaves.append(vector[..., start:end].reshape(batch + shape).astype(dtype))
            start = end
        return jax.tree.unflatten(self.treedef, leaves)


def layout(x0: PyTree[Array], *, batched: bool = False) -> tuple[Layout, PyTree[Array]]:
    """Lay out the variables.

    Args:
        x0: A pytree of floating arrays.
        batched: Whether each has a leading axis of problems.

    Returns:
        The layout of one problem, and `x0` as JAX arrays.

    Raises:
        TypeError: If a leaf is not floating.
        ValueError: If there is none, or the leading axes are not of one length.
    """
    leaves, treedef = jax.tree.flatten(x0)
    if not leaves:
        raise ValueError(f"x0: {x0!r}, expected a pytree with at least one array.")
    leaves = [checks.floating("x0", leaf) for leaf in leaves]
    if batched and len({leaf.shape[:1] for leaf in leaves} | {()}) != 2:
        raise ValueError(
            f"x0s: arrays of shapes {[leaf.shape for leaf in leaves]}, expected one leading axis "
            "of as many problems in each."
        )
    shapes = tuple(leaf.shape[batched:] for leaf in leaves)
    dtypes = tuple(leaf.dtype for leaf in leaves)
    return Layout(treedef, shapes, dtypes), jax.tree.unflatten(treedef, leaves)


def bounds(box: Any, x0: PyTree[Array], variables: Layout, *, batched: bool = False) -> Box:
    """The box of the flat vector.

    Args:
        box: None, or a pair of bounds: each None, a number, an array that broadcasts to `x0`, or a
            pytree of such like `x0`.
        x0: The variables.
        variables: Their layout.
        batched: Whether they have a leading axis of problems, to which the bounds broadcast too.

    Returns:
        A `Box` of scalars where both bounds are numbers, else of vectors like the flat variables.

    Raises:
        ValueError: If `box` is no such pair.
    """
    if box is None:
        box = (None, None)
    pair = isinstance(box, tuple | list) and len(box) == 2
    is_array = variables.treedef == _LEAF
    if pair and is_array and all(isinstance(bound, tuple | list) for bound in box):
        pair = any(len(bound) != 2 for bound in box)
    if not pair:
        raise ValueError(
            f"box: {box!r}, expected a pair (lower, upper) of numbers, arrays or None; of a list "
            "of pairs, one for each variable, pass box=(jnp.array(lower), jnp.array(upper))."
        )
    return Box(
        _bound("lower", box[0], -jnp.inf, x0, variables, batched),
        _bound("upper", box[1], jnp.inf, x0, variables, batched),
    )


def _bound(
    name: str, value: Any, infinity: float, x0: PyTree[Array], variables: Layout, batched: bool
) -> Float[Array, "..."]:
    def is_none(node):
        return node is None

    dtype, count = variables.dtype, variables.treedef.num_leaves
    structure: Any = jax.tree.structure(value, is_leaf=is_none)
    one = structure == _LEAF or (variables.treedef == _LEAF and isinstance(value, tuple | list))
    if one and jnp.ndim(value if value is not None else 0) == 0 and not batched:
        return jnp.asarray(infinity if value is None else value, dtype)
    if not one and structure != variables.treedef:
        raise ValueError(
            f"box: {name} bound of structure {structure}, expected that of x0, "
            f"{variables.treedef}, or one number."
        )
    parts = [value] * count if one else jax.tree.leaves(value, is_leaf=is_none)
    leaves = []
    for part, like in zip(parts, jax.tree.leaves(x0), strict=True):
        array = jnp.asarray(infinity if part is None else part, dtype)
        try:
            leaves.append(jnp.broadcast_to(array, like.shape))
        except ValueError:
            raise ValueError(
                f"box: {name} bound of shape {array.shape} does not broadcast to the shape "
                f"{like.shape} of x0; pass a number or an array of that shape."
            ) from None
    return variables.flatten(jax.tree.unflatten(variables.treedef, leaves), batched=batched)
