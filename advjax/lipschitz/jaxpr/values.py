"""The values that the interpreter computes with: what is known of an intermediate result."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float

from advjax.lipschitz.jaxpr.scaled import Scalar, Scaled, scaled, unscaled


class NotLipschitzError(ValueError):
    """An operation has no Lipschitz constant that holds for every input, or none is known.

    Attributes:
        remedy: What would help; by default a rule of one's own.
    """

    def __init__(self, message: str, remedy: str = ""):
        super().__init__(message)
        self.remedy = remedy


OWN_FUNCTION = (
    "Put what it is a part of in a function under jax.jit and tell that function's constant with "
    "lipschitz.register_rule."
)
"""The remedy for an operation that is Lipschitz only as a part of something larger."""


class Interval(NamedTuple):
    """Lower and upper bounds of the entries of an array."""

    lower: Float[Array, "*shape"]
    upper: Float[Array, "*shape"]


class Operation(NamedTuple):
    """An operation of the function whose bound is sought.

    Attributes:
        name: The name of the primitive, as in a printed jaxpr, or of the registered function.
        inputs: The operands: a `Signal` where one depends on the function's input, else an array.
        params: The primitive's parameters.
        shape: The shape of its (first) result.
        label: The modules that it is in, such as "MLP/hidden1".
        source: The line of code that it comes from.
    """

    name: str
    inputs: tuple[Any, ...]
    params: Mapping[str, Any]
    shape: tuple[int, ...]
    label: str = ""
    source: str = ""

    @property
    def signals(self) -> list["Signal"]:
        """The inputs that depend on the function's input."""
        return [x for x in self.inputs if isinstance(x, Signal)]


@dataclasses.dataclass(frozen=True, eq=False)
class Signal:
    """An intermediate result that depends on the function's input.

    Attributes:
        shape: Its shape.
        dtype: Its dtype.
        bound: Its Lipschitz constant with respect to the input, infinite if none is known; or a
            function that computes the constant when it is needed.
        operation: The operation that made it, as written; None for the input itself.
        layer: The function that this operation completes, such as a softmax; else the operation.
        reason: Why the constant is infinite.
        interval: Bounds of its entries for the inputs in question; None if unknown.
        centre: Bounds of its entries at the example inputs alone.
    """

    shape: tuple[int, ...]
    dtype: Any
    bound: Scaled | Scalar | Callable[[], Scaled]
    operation: Operation | None = None
    layer: Operation | None = None
    reason: str = ""
    interval: Interval | None = None
    centre: Interval | None = None

    @functools.cached_property
    def scaled(self) -> Scaled:
        """The Lipschitz constant, which may be too small or too large for a number in float32."""
        bound = self.bound() if callable(self.bound) else self.bound
        return bound if isinstance(bound, Scaled) else scaled(bound)

    @functools.cached_property
    def constant(self) -> Scalar:
        """The Lipschitz constant."""
        return unscaled(self.scaled)

    def with_constant(self, constant: Scalar) -> "Signal":
        """The same signal with another constant."""
        copy = dataclasses.replace(self)
        copy.__dict__["constant"] = constant
        return copy

    @property
    def size(self) -> int:
        """The number of entries."""
        return math.prod(self.shape)

    @property
    def inputs(self) -> tuple[Any, ...]:
        """The operands of the operation that made it."""
        return self.operation.inputs if self.operation else ()

    @property
    def signals(self) -> list["Signal"]:
        """The operands that depend on the function's input."""
        return self.operation.signals if self.operation else []

    @property
    def params(self) -> Mapping[str, Any]:
        """The parameters of the operation that made it."""
        return self.operation.params if self.operation else {}

    def made_by(self, *names: str) -> bool:
        """Whether a primitive of one of these names made it."""
        return self.operation is not None and self.operation.name in names


def concrete(*values: Any) -> bool:
    """Whether values are known now, rather than traced."""
    return not any(isinstance(value, jax.core.Tracer) for value in values)


def known_now(function: Callable[..., Any]) -> Callable[..., Any]:
    """Evaluate a function now where its arguments are known, even while one around it is traced."""

    @functools.wraps(function)
    def evaluate(*args, **options):
        leaves = jax.tree.leaves((args, options))
        places = [(x.interval, x.centre) for x in leaves if isinstance(x, Signal)]
        if not concrete(*leaves, *jax.tree.leaves(places)):
            return function(*args, **options)
        with jax.ensure_compile_time_eval():
            return function(*args, **options)

    return evaluate
