"""The values of the interpreter: intermediate results with their constants and intervals."""

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
        remedy: A suggested fix; by default to register a rule.
    """

    def __init__(self, message: str, remedy: str = ""):
        super().__init__(message)
        self.remedy = remedy


OWN_FUNCTION = (
    "Wrap the code around it in a function under jax.jit and register that function's constant "
    "with lipschitz.register_rule."
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
        operation: The operation that computed it; None for the input itself.
        layer: The function that this operation completes, such as a softmax; otherwise the
            operation.
        reason: Why the constant is infinite.
        interval: Bounds of its entries for the inputs in question; None if unknown.
        centre: Bounds of its entries at the example inputs; None if unknown.
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
        """The Lipschitz constant, even where it is too small or too large for float32."""
        bound = self.bound() if callable(self.bound) else self.bound
        return bound if isinstance(bound, Scaled) else scaled(bound)

    @functools.cached_property
    def constant(self) -> Scalar:
        """The Lipschitz constant in floating point, rounded up."""
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
        """The operands of the operation that computed it."""
        return self.operation.inputs if self.operation else ()

    @property
    def signals(self) -> list["Signal"]:
        """The operands that depend on the function's input."""
        return self.operation.signals if self.operation else []

    @property
    def params(self) -> Mapping[str, Any]:
        """The parameters of the operation that computed it."""
        return self.operation.params if self.operation else {}

    def made_by(self, *names: str) -> bool:
        """Whether a primitive of one of these names computed it."""
        return self.operation is not None and self.operation.name in names


def concrete(*values: Any) -> bool:
    """Whether values are known now, rather than traced."""
    return not any(isinstance(value, jax.core.Tracer) for value in values)


def known_now(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a function to be evaluated at once if its arguments are known, even under a trace.

    The bound can then branch on the result: an error is raised, or a pattern matched, while a
    function around it is compiled.
    """

    @functools.wraps(function)
    def evaluate(*args: Any, **options: Any) -> Any:
        leaves = jax.tree.leaves((args, options))
        places = [(x.interval, x.centre) for x in leaves if isinstance(x, Signal)]
        if not concrete(*leaves, *jax.tree.leaves(places)):
            return function(*args, **options)
        with jax.ensure_compile_time_eval():
            return function(*args, **options)

    return evaluate
