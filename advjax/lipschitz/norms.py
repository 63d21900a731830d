"""Operator norms of dense and convolutional layers, between certified bounds."""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from advjax import checks
from advjax.lipschitz.convolution import Axis, Convolution
from advjax.lipschitz.estimates import Pair, power_of_two, top_pair
from advjax.lipschitz.gram import norm_bound

Padding = str | Sequence[tuple[int, int]]


class NormBound(NamedTuple):
    """An operator norm between two bounds.

    Attributes:
        lower: The length that some unit vector is given, found by the Lanczos method, right up to
            rounding.
        upper: What the norm does not exceed, rounding included; infinite if the kernel is not
            finite.
    """

    lower: Float[Array, ""]
    upper: Float[Array, ""]


class Dense(NamedTuple):
    """All of a dense layer but its kernel."""

    def input_shape(self, kernel_shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of one input."""
        return kernel_shape[:1]

    def output_shape(self, kernel_shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of one output."""
        return kernel_shape[1:]

    def apply(self, kernel: Float[Array, "in out"], x: Float[Array, " in"]) -> Float[Array, " out"]:
        """The product of one input with the kernel."""
        return jnp.matmul(x, kernel, precision=jax.lax.Precision.HIGHEST)

    def bound(self, kernel: Float[Array, "in out"]) -> Float[Array, ""]:
        """An upper bound of the operator norm; infinite unless it is finite."""
        return norm_bound(kernel)


class Linear(NamedTuple):
    """A linear layer: a layer of a chain.

    Attributes:
        kernel: Its kernel.
        kind: The rest.
    """

    kernel: Float[Array, "*kernel"]
    kind: Dense | Convolution


def dense_norm(kernel: Float[ArrayLike, "in out"]) -> NormBound:
    """The spectral norm of a dense layer's kernel, between certified bounds.

    Args:
        kernel: The matrix of `x @ kernel`, of any scale; its transpose has the same norm.

    Returns:
        A `NormBound`. Both bounds have the gradient of the norm, 0 for a kernel of zeros.

    Raises:
        TypeError: If the kernel is not floating.
        ValueError: If it is not a matrix.

    Source: `advjax/lipschitz/gram.py` derives the upper bound and its margin for rounding.
    """
    kernel = _floating(kernel)
    if kernel.ndim != 2:
        raise ValueError(f"kernel: shape {kernel.shape}, expected (in, out).")
    return _between(Dense(), kernel)


def conv_norm(
    kernel: Float[ArrayLike, "*window in out"],
    input_shape: tuple[int, ...],
    *,
    strides: int | Sequence[int] = 1,
    padding: Padding = "SAME",
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> NormBound:
    """The operator norm of a convolution with zero padding, between certified bounds.

    Of the layer as it is, on images of this size: not of its kernel reshaped to a matrix, nor of a
    cyclic convolution.

    Args:
        kernel: The kernel, HWIO; "in" counts the input channels of one group. One spatial axis or
            three will do as well as two.
        input_shape: The shape (H, W, C) of one image.
        strides: The stride, of all axes or of each.
        padding: "SAME", "VALID", or the zeros `(low, high)` that are added to each axis.
        dilation: The distance of the kernel's taps, of all axes or of each.
        groups: How many groups the channels form: those of the image for a depthwise kernel.

    Returns:
        A `NormBound`. Both bounds have the gradient of the norm, 0 for a kernel of zeros.

    Raises:
        TypeError: If the kernel is not floating.
        ValueError: If the shapes do not fit together, or an option is none of those above.

    Source: Sedghi et al. (2019) for cyclic convolutions; `advjax/lipschitz/convolution.py` derives
    strides, padding and the margin for rounding.
    """
    kernel, layer = conv(
        kernel, input_shape, strides=strides, padding=padding, dilation=dilation, groups=groups
    )
    return _between(layer, _floating(kernel))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
@functools.partial(jax.jit, static_argnums=0)
def upper_norm(layer: Dense | Convolution, kernel: Float[Array, "*kernel"]) -> Float[Array, ""]:
    """The upper bound alone, with the gradient of the norm times its ratio to the norm."""
    return layer.bound(kernel)


@upper_norm.defjvp
def _upper_norm_jvp(layer, primals, tangents):
    upper, lower = upper_norm(layer, *primals), _lower_norm(layer, *primals)
    _, slope = jax.jvp(functools.partial(_lower_norm, layer), primals, tangents)
    usable = (lower > 0) & jnp.isfinite(upper)
    return upper, slope * jnp.where(usable, upper / jnp.where(usable, lower, 1), 0)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _lower_norm(layer: Dense | Convolution, kernel: Float[Array, "*kernel"]) -> Float[Array, ""]:
    return _top_pair(layer, kernel).value


@_lower_norm.defjvp
def _lower_norm_jvp(layer, primals, tangents):
    pair = _top_pair(layer, *primals)
    # u^T A v is the norm and, with the unit vectors u and v held fixed, has its gradient.
    return pair.value, jnp.sum(pair.left * layer.apply(*tangents, pair.right))


@functools.partial(jax.jit, static_argnums=0)
def _top_pair(layer: Dense | Convolution, kernel: Float[Array, "*kernel"]) -> Pair:
    like = jax.ShapeDtypeStruct(layer.input_shape(kernel.shape), kernel.dtype)
    # Scaled, so that the lengths of what it makes neither underflow nor overflow.
    scale = power_of_two(kernel)
    pair = top_pair(functools.partial(layer.apply, kernel / scale), like)
    return pair._replace(value=pair.value * scale)


def _between(layer: Dense | Convolution, kernel: Float[Array, "*kernel"]) -> NormBound:
    if not kernel.size or not math.prod(layer.input_shape(kernel.shape)):
        return NormBound(jnp.zeros((), kernel.dtype), jnp.zeros((), kernel.dtype))
    return NormBound(_lower_norm(layer, kernel), upper_norm(layer, kernel))


def _floating(kernel: ArrayLike) -> Array:
    kernel = checks.floating("kernel", kernel)
    return kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32))


def conv(
    kernel: Float[ArrayLike, "*window in out"],
    input_shape: tuple[int, ...],
    *,
    strides: int | Sequence[int] = 1,
    padding: Padding = "SAME",
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Linear:
    """A convolution with zero padding, as a layer for `product`, `eclipse` or `lipsdp`.

    Args:
        kernel: As for `conv_norm`.
        input_shape: As for `conv_norm`.
        strides: As for `conv_norm`.
        padding: As for `conv_norm`.
        dilation: As for `conv_norm`.
        groups: As for `conv_norm`.

    Returns:
        A `Linear`: the kernel, and all else.

    Raises:
        TypeError: As for `conv_norm`.
        ValueError: As for `conv_norm`.
    """
    kernel = checks.floating("kernel", kernel)
    rank = kernel.ndim - 2
    if rank < 1 or len(input_shape) != rank + 1:
        raise ValueError(
            f"input_shape: {tuple(input_shape)} for a kernel of shape {kernel.shape}, expected "
            "(H, W, C) of one image for a kernel (height, width, in, out)."
        )

    def each(name, value):
        values = [value] * rank if isinstance(value, int) else list(value)
        if len(values) != rank:
            raise ValueError(f"{name}: {value!r}, expected an integer or one for each axis.")
        return [checks.positive_int(name, v) for v in values]

    stride, distance = each("strides", strides), each("dilation", dilation)
    size, window = input_shape[:-1], kernel.shape[:-2]
    covered = [(w - 1) * d + 1 for w, d in zip(window, distance, strict=True)]
    if isinstance(padding, str):
        if padding not in ("SAME", "VALID"):
            raise ValueError(f'padding: {padding!r}, expected "SAME", "VALID" or pairs.')
        pads = jax.lax.padtype_to_pads(size, covered, stride, padding)
    else:
        pads = list(padding)
        if len(pads) != rank or any(len(pair) != 2 for pair in pads):
            raise ValueError(f"padding: {padding!r}, expected a pair (low, high) for each axis.")
    axes = tuple(
        Axis(int(n), int(w), s, int(low), int(high), d)
        for n, w, s, (low, high), d in zip(size, window, stride, pads, distance, strict=True)
    )
    groups = checks.positive_int("groups", groups)
    *_, inputs, outputs = kernel.shape
    if inputs * groups != input_shape[-1] or outputs % groups:
        raise ValueError(
            f"kernel: shape {kernel.shape} for {input_shape[-1]} input channels in {groups} "
            "group(s), expected (*window, input channels / groups, output channels) with output "
            "channels that the groups divide."
        )
    return Linear(kernel, Convolution(axes, groups))
