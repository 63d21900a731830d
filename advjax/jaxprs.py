"""What jaxprs are made of."""

from collections.abc import Iterator

import jax
from jax.extend import core


def inner(eqn: core.JaxprEqn) -> Iterator[core.Jaxpr]:
    """Yield the programs that an operation calls.

    Args:
        eqn: An operation of a jaxpr, such as a loop, a condition or a jitted function.

    Yields:
        The jaxprs among its parameters, without their constants.
    """
    for leaf in jax.tree.leaves(list(eqn.params.values())):
        if isinstance(leaf, core.ClosedJaxpr):
            yield leaf.jaxpr
        elif isinstance(leaf, core.Jaxpr):
            yield leaf
