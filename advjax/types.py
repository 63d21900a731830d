"""The few types that every part of the library shares."""

from collections.abc import Callable
from typing import NamedTuple

from jax.typing import ArrayLike
from jaxtyping import Array, Float

LogitsFn = Callable[[Float[Array, "*shape"]], Float[Array, " classes"]]
"""A classifier of ONE example, without a batch axis."""


class Box(NamedTuple):
    """The box in which an image lives, each bound broadcast to the image's shape.

    Any `(lower, upper)` pair is accepted where a box is asked for. A bound may be infinite.
    """

    lower: ArrayLike = 0.0
    upper: ArrayLike = 1.0
