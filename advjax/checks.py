"""Checks of arguments: shapes, dtypes and options, and values where they are known."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from advjax.types import Box, LogitsFn

_ROUNDING_OF_PIXELS = 1e-3  # of the width of the box


def floating(name: str, array: Any) -> Float[Array, "*shape"]:
    """`array` as a JAX array; TypeError unless it is real and floating."""
    array = jnp.asarray(array)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        remedy = "convert it to float32"
        if array.dtype == jnp.uint8:
            remedy = f"scale 8-bit images to [0, 1]: {name} / 255.0"
        raise TypeError(f"{name}: dtype {array.dtype}, expected a floating one; {remedy}.")
    return array


def class_index(name: str, value: Any) -> Int[Array, ""]:
    """`value` as an int32 scalar; TypeError unless an integer, ValueError unless a scalar."""
    if value is None:
        raise TypeError(f"{name}: None, expected an integer class index.")
    value = jnp.asarray(value)
    if not jnp.issubdtype(value.dtype, jnp.integer):
        raise TypeError(
            f"{name}: dtype {value.dtype}, expected an integer class index; "
            "for one-hot or soft labels pass their argmax."
        )
    if value.shape:
        raise ValueError(
            f"{name}: shape {value.shape}, expected one class index; for a batch of images use "
            f"jax.vmap over x and {name}."
        )
    return value.astype(jnp.int32)


def one_example(logits: Any) -> Float[Array, " classes"]:
    """`logits` as a JAX array; ValueError if it has a batch axis."""
    logits = jnp.asarray(logits)
    if logits.ndim != 1:
        raise ValueError(
            f"logits: shape {logits.shape}, expected (classes,) of one example; "
            "use jax.vmap for a batch."
        )
    return logits


def pair(name: str, value: Any) -> tuple[Any, Any]:
    """`value` as a pair; ValueError unless it is one."""
    try:
        lower, upper = value
    except (TypeError, ValueError):
        raise ValueError(
            f"{name}: {value!r}, expected a pair (lower, upper), such as Box(0.0, 1.0)."
        ) from None
    return lower, upper


def box(value: Any, x: Float[Array, "*shape"]) -> Box:
    """`value` as a `Box` of two arrays; ValueError unless a pair that broadcasts to `x`.

    A scalar stays one, as it need not be read for every pixel; another bound is shaped like `x`.
    """

    def bound(name: str, array: Any) -> Float[Array, "..."]:
        array = jnp.asarray(array, x.dtype)
        try:
            return jnp.broadcast_to(array, x.shape) if array.ndim else array
        except ValueError:
            raise ValueError(
                f"box: {name} bound of shape {array.shape} does not broadcast to the shape "
                f"{x.shape} of the image; pass a scalar or an array of that shape."
            ) from None

    lower, upper = pair("box", value)
    return Box(bound("lower", lower), bound("upper", upper))


def is_outside(x: Any, box: Box, *, xp: Any = jnp) -> Any:
    """Whether `x` leaves the box by more than rounding: a thousandth of its (finite) width.

    Args:
        x: An image, or several.
        box: `(lower, upper)`, each broadcast to `x`.
        xp: The array library that computes it, `jax.numpy` or `numpy`.
    """
    lower, upper = map(xp.asarray, box)
    width = upper - lower
    width = xp.max(width, initial=0, where=xp.isfinite(width))
    excess = xp.maximum(lower - x, x - upper)
    return xp.max(excess, initial=-xp.inf) > _ROUNDING_OF_PIXELS * width


def inside(name: str, x: Any, box: Any) -> None:
    """ValueError if `x` is outside the box, as far as both are known and valid.

    Traced arrays, an empty box and pixels that are not finite get a status later.
    """
    lower, upper = pair("box", box)
    if any(isinstance(array, jax.core.Tracer) for array in (x, lower, upper)):
        return
    pixels, lower, upper = (np.asarray(array).astype(np.float32) for array in (x, lower, upper))
    try:
        np.broadcast_shapes(pixels.shape, lower.shape, upper.shape)
    except ValueError:
        return
    with np.errstate(all="ignore"):
        allowed = np.all((lower <= upper) & (lower < np.inf) & (upper > -np.inf))
        if not allowed or not np.all(np.isfinite(pixels)):
            return
        if not is_outside(pixels, Box(lower, upper), xp=np):
            return
    remedy = "pass the box of its pixels as box="
    if lower.min() == 0 and upper.max() == 1 and pixels.min() >= 0:
        remedy = f"scale it to [0, 1], as by {name} / 255, or {remedy}"
    raise ValueError(
        f"{name}: values in [{pixels.min():g}, {pixels.max():g}], expected the box "
        f"[{lower.min():g}, {upper.max():g}]; {remedy}."
    )


def model(name: str, logits_fn: Any) -> None:
    """TypeError unless `logits_fn` can be called."""
    if not callable(logits_fn):
        raise TypeError(
            f"{name}: {type(logits_fn).__name__}, expected a function of one example; for a "
            "Flax module pass lambda x: model.apply(params, x)."
        )


def logits(
    logits_fn: LogitsFn, x: Float[Array, "*shape"] | jax.ShapeDtypeStruct
) -> jax.ShapeDtypeStruct:
    """The shape and dtype of `logits_fn(x)`.

    TypeError unless it is a function that returns one floating array, ValueError unless that array
    has the shape `(classes,)` with at least 2 classes.
    """
    model("logits_fn", logits_fn)
    out = jax.eval_shape(logits_fn, x)
    if not hasattr(out, "shape"):
        raise TypeError(
            f"logits_fn: returns a {type(out).__name__}, expected one array of logits; for a model "
            "with several outputs pass lambda x: model(x)[0]."
        )
    if len(out.shape) != 1 or out.shape[0] < 2:
        remedy = "return one logit for each class"
        if math.prod(out.shape) == 1:
            remedy = (
                "of a model with one logit z make two classes: "
                "lambda x: jnp.stack([jnp.zeros_like(z := model(x).squeeze()), z])"
            )
        elif len(out.shape) == 2 and out.shape[0] == 1:
            remedy = "if the model wants a batch, pass lambda x: model(x[None])[0]"
        elif len(out.shape) == 2:
            remedy = "pass ONE example as x and use jax.vmap for a batch"
        raise ValueError(
            f"logits_fn: returns shape {out.shape} for x of shape {x.shape}, expected (classes,) "
            f"with at least 2 classes; {remedy}."
        )
    if not jnp.issubdtype(out.dtype, jnp.floating):
        raise TypeError(
            f"logits_fn: returns dtype {out.dtype}, expected floating logits (not predictions)."
        )
    return out


def scalar(name: str, out: Any) -> None:
    """ValueError unless what the function `name` returns has the shape of a floating scalar."""
    shape, dtype = getattr(out, "shape", None), getattr(out, "dtype", None)
    if shape != () or dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        got = f"shape {shape} of dtype {dtype}" if dtype is not None else f"{type(out).__name__}"
        raise ValueError(f"{name}: returns {got}, expected a floating scalar; sum or index it.")


def positive_int(name: str, value: Any) -> int:
    """`value` as an int; ValueError unless an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ValueError(f"{name}: {value!r}, expected an integer of at least 1.")
    return int(value)


def number(name: str, value: Any, *, minimum: float, exclusive: bool = False) -> float:
    """`value` as a float; ValueError unless a number of at least (or above) the minimum."""
    try:
        out = float(value)
    except (TypeError, ValueError):
        out = float("nan")
    if not (out > minimum if exclusive else out >= minimum) or out == float("inf"):
        relation = "above" if exclusive else "of at least"
        raise ValueError(f"{name}: {value!r}, expected a finite number {relation} {minimum}.")
    return out


def fraction(name: str, value: Any) -> float:
    """`value` as a float; ValueError unless a number above 0 and below 1."""
    out = number(name, value, minimum=0, exclusive=True)
    if out >= 1:
        raise ValueError(f"{name}: {out}, expected a number below 1.")
    return out


def nonnegative(name: str, value: Any, dtype: Any) -> Float[Array, ""]:
    """`value` as a scalar; ValueError unless one number, of at least 0 where it is not traced."""
    if not isinstance(value, jax.Array | np.ndarray):
        value = number(name, value, minimum=0)
    value = jnp.asarray(value, dtype)
    if value.shape:
        raise ValueError(
            f"{name}: shape {value.shape}, expected one number; use jax.vmap over several."
        )
    return value
