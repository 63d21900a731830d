"""The types that all parts of the library use."""

from collections.abc import Callable
from typing import NamedTuple

from jax.typing import ArrayLike
from jaxtyping import Array, Float

LogitsFn = Callable[[Float[Array, "*shape"]], Float[Array, " classes"]]
"""A classifier of ONE example, without a batch axis."""


class Box(NamedTuple):
    """The range of the pixels, each bound broadcast to the image's shape.

    Wherever a box is expected, any pair `(lower, upper)` will do. A bound may be infinite.
    """

    lower: ArrayLike = 0.0
    upper: ArrayLike = 1.0
