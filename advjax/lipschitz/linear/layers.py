"""Dense layers and convolutions with zero padding, as pytrees with certified norms."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Complex, Float, Int

from advjax import checks
from advjax.lipschitz.linear import norms
from advjax.lipschitz.linear.norms import NormBound
from advjax.lipschitz.linear.rounding import gamma, magnitude_bound, power_of_two
from advjax.lipschitz.linear.spectral_norm import SQUARINGS, norm_bound

Padding = str | Sequence[tuple[int, int]]

# A convolution with no more entries, bounded with no more multiplications, is written as a matrix.
_ENTRIES = 2**24
_PRODUCTS = 2**34
BATCH = 2**22  # matrix entries of the frequencies that are bounded at once

LayerType = TypeVar("LayerType", bound=type)


def _layer(cls: LayerType) -> LayerType:
    """Register a layer as a pytree whose one leaf is the kernel.

    Unlike `jax.tree_util.register_dataclass`, unflattening does not call the constructor: its
    checks would fail on the placeholders and batches of kernels that transformations put there.
    """
    names = [field.name for field in dataclasses.fields(cls) if field.name != "kernel"]

    def flatten(layer: Any) -> tuple[list, tuple]:
        key = jax.tree_util.GetAttrKey("kernel")
        return [(key, layer.kernel)], tuple(getattr(layer, name) for name in names)

    def unflatten(values: tuple, kernels: Any) -> Any:
        layer: Any = object.__new__(cls)
        for name, value in zip(("kernel", *names), (*kernels, *values), strict=True):
            object.__setattr__(layer, name, value)
        return layer

    jax.tree_util.register_pytree_with_keys(cls, flatten, unflatten)
    return cls


@_layer
@dataclasses.dataclass(frozen=True, eq=False)
class Dense:
    """A dense layer without its bias: `x @ kernel`.

    Attributes:
        kernel: The matrix, in float32 at least.
    """

    kernel: Float[Array, "in out"]

    def __post_init__(self) -> None:
        kernel = _floating(self.kernel)
        if kernel.ndim != 2:
            raise ValueError(f"kernel: shape {kernel.shape}, expected (in, out).")
        object.__setattr__(self, "kernel", kernel)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one input."""
        return self.kernel.shape[:1]

    @property
    def output_shape(self) -> tuple[int, ...]:
        """The shape of one output."""
        return self.kernel.shape[1:]

    def apply(self, x: Float[Array, " in"]) -> Float[Array, " out"]:
        """Multiply one input by the kernel."""
        return jnp.matmul(x, self.kernel, precision=jax.lax.Precision.HIGHEST)

    def norm(self) -> NormBound:
        """Bound the operator norm from both sides; both bounds have the gradient of the norm."""
        return norms.between(self)

    def certified(self) -> Float[Array, ""]:
        """Bound the operator norm from above; infinite unless the kernel is finite."""
        return norm_bound(self.kernel)


class Axis(NamedTuple):
    """A spatial axis of a convolution.

    Attributes:
        size: Number of inputs along the axis.
        window: Number of taps of the kernel.
        stride: Distance of the windows of neighbouring outputs.
        low: Number of zeros added before the first input.
        high: Number of zeros added after the last.
        dilation: Distance of neighbouring taps.
    """

    size: int
    window: int
    stride: int
    low: int
    high: int
    dilation: int

    @property
    def out_size(self) -> int:
        """The number of outputs along the axis."""
        covered = (self.window - 1) * self.dilation + 1
        return max((self.size + self.low + self.high - covered) // self.stride + 1, 0)

    @property
    def offsets(self) -> np.ndarray:
        """The input position that each tap reads for the first output."""
        return np.arange(self.window) * self.dilation - self.low

    @property
    def circle(self) -> int:
        """The fewest outputs of a cyclic convolution that contains this one.

        Divide the inputs into J blocks of `stride` inputs. Output o of n reads the inputs
        `stride o + offset`, which are in block `o + q`; let [first, last] be the range of o + q. On
        a circle of M blocks with

            M >= max(J, n, J - first, last + 1)

        the blocks that are read outside [0, J), the padding, do not wrap around to an input.
        """
        q = self.offsets // self.stride
        blocks = -(-self.size // self.stride)
        first, last = int(q[0]), int(q[-1]) + self.out_size - 1
        return max(blocks, self.out_size, blocks - first, last + 1)


@_layer
@dataclasses.dataclass(frozen=True, eq=False)
class Conv:
    """A convolution with zero padding and without its bias, on images of one size.

    Attributes:
        kernel: The kernel, HWIO with any number of spatial axes, in float32 at least; "in" counts
            the input channels of one group.
        input_shape: The shape (H, W, C) of one image.
        strides: The stride of each axis; an integer for all of them.
        padding: The zeros `(low, high)` added to each axis; "SAME" or "VALID".
        dilation: The distance between the kernel's taps on each axis; an integer for all of them.
        groups: The number of groups of channels; that of the image's channels for a depthwise
            kernel.
    """

    kernel: Float[Array, "*window in out"]
    input_shape: tuple[int, ...]
    strides: int | Sequence[int] = dataclasses.field(default=1, kw_only=True)
    padding: Padding = dataclasses.field(default="SAME", kw_only=True)
    dilation: int | Sequence[int] = dataclasses.field(default=1, kw_only=True)
    groups: int = dataclasses.field(default=1, kw_only=True)

    def __post_init__(self) -> None:
        kernel = _floating(self.kernel)
        rank = kernel.ndim - 2
        if rank < 1 or len(self.input_shape) != rank + 1:
            raise ValueError(
                f"input_shape: {tuple(self.input_shape)} for a kernel of shape {kernel.shape}, "
                "expected (H, W, C) of one image for a kernel (height, width, in, out)."
            )
        strides, dilation = (
            _each(name, getattr(self, name), rank) for name in ("strides", "dilation")
        )
        size, window = self.input_shape[:-1], kernel.shape[:-2]
        covered = [(w - 1) * d + 1 for w, d in zip(window, dilation, strict=True)]
        groups = checks.positive_int("groups", self.groups)
        *_, inputs, outputs = kernel.shape
        if inputs * groups != self.input_shape[-1] or outputs % groups:
            raise ValueError(
                f"kernel: shape {kernel.shape} for {self.input_shape[-1]} input channels in "
                f"{groups} group(s), expected (*window, input channels / groups, output channels) "
                "with output channels that the groups divide."
            )
        values = {
            "kernel": kernel,
            "input_shape": tuple(map(int, self.input_shape)),
            "strides": strides,
            "padding": _pads(self.padding, size, covered, strides),
            "dilation": dilation,
            "groups": groups,
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @property
    def axes(self) -> tuple[Axis, ...]:
        """The spatial axes."""
        geometry: Any = (self.input_shape[:-1], self.kernel.shape[-2 - self._rank : -2])
        geometry = (*geometry, self.strides, self.padding, self.dilation)
        return tuple(
            Axis(size, window, stride, low, high, dilation)
            for size, window, stride, (low, high), dilation in zip(*geometry, strict=True)
        )

    @property
    def _rank(self) -> int:
        return len(self.input_shape) - 1

    @property
    def output_shape(self) -> tuple[int, ...]:
        """The shape of one output, its channels last."""
        return (*(axis.out_size for axis in self.axes), self.kernel.shape[-1])

    def apply(self, x: Float[Array, "*shape"]) -> Float[Array, "*out"]:
        """Convolve one image."""
        spatial = tuple(range(self._rank))
        channels_last = (0, self._rank + 1, *(axis + 1 for axis in spatial))
        options: Any = {"padding": self.padding, "rhs_dilation": self.dilation}
        return jax.lax.conv_general_dilated(
            x[None],
            self.kernel,
            window_strides=[axis.stride for axis in self.axes],
            **options,
            dimension_numbers=jax.lax.ConvDimensionNumbers(
                channels_last, (self._rank + 1, self._rank, *spatial), channels_last
            ),
            feature_group_count=self.groups,
            precision=jax.lax.Precision.HIGHEST,
        )[0]

    def norm(self) -> NormBound:
        """Bound the operator norm from both sides; both bounds have the gradient of the norm."""
        return norms.between(self)

    def certified(self) -> Float[Array, ""]:
        """Bound the operator norm from above; infinite unless the kernel is finite."""
        kernel = self.kernel
        if not kernel.size or not math.prod(self.input_shape):
            return jnp.zeros((), kernel.dtype)
        # Groups have their own inputs and outputs, so that the norm is the largest of theirs.
        *window, inputs, outputs = kernel.shape
        split = kernel.reshape(*window, inputs, self.groups, outputs // self.groups)
        kernels = jnp.moveaxis(split, -2, 0)
        bound = _matrix_bound if self._is_small() else _frequency_bound
        entries = math.prod(self.input_shape[:-1]) * kernel.size // self.groups
        batch = max(1, min(self.groups, BATCH // entries))

        def group_bound(kernel: Float[Array, "*window in out"]) -> Float[Array, ""]:
            shape = (*self.input_shape[:-1], inputs)
            return bound(dataclasses.replace(self, kernel=kernel, input_shape=shape, groups=1))

        return jnp.max(jax.lax.map(group_bound, kernels, batch_size=batch))

    def _is_small(self) -> bool:
        """Whether the groups are small enough to be bounded as matrices, which is tighter."""
        sizes = math.prod(self.input_shape), math.prod(self.output_shape)
        small, large = sorted(size // self.groups for size in sizes)
        products = self.groups * small**2 * (large + SQUARINGS * small)
        return small * large <= _ENTRIES and products <= _PRODUCTS


Layer = Dense | Conv


def _floating(kernel: ArrayLike) -> Array:
    kernel = checks.floating("kernel", kernel)
    return kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32))


def _each(name: str, value: int | Sequence[int], rank: int) -> tuple[int, ...]:
    """A value for each axis."""
    values = [value] * rank if isinstance(value, int) else list(value)
    if len(values) != rank:
        raise ValueError(f"{name}: {value!r}, expected an integer or one for each axis.")
    return tuple(checks.positive_int(name, v) for v in values)


def _pads(
    padding: Padding, size: Sequence[int], covered: Sequence[int], strides: Sequence[int]
) -> tuple[tuple[int, int], ...]:
    """The zeros added to each axis."""
    if isinstance(padding, str):
        if padding not in ("SAME", "VALID"):
            raise ValueError(f'padding: {padding!r}, expected "SAME", "VALID" or pairs.')
        pads = jax.lax.padtype_to_pads(size, covered, strides, padding)
    else:
        pads = list(padding)
        if len(pads) != len(size) or any(len(pair) != 2 for pair in pads):
            raise ValueError(f"padding: {padding!r}, expected a pair (low, high) for each axis.")
    return tuple((int(low), int(high)) for low, high in pads)


def dense_norm(kernel: Float[ArrayLike, "in out"]) -> NormBound:
    """Bound the spectral norm of a dense layer's kernel from both sides.

    Args:
        kernel: The matrix of `x @ kernel`, of any scale; its transpose has the same norm.

    Returns:
        A `NormBound`. Both bounds have the gradient of the norm, 0 for a kernel of zeros.

    Raises:
        TypeError: If the kernel is not floating.
        ValueError: If it is not a matrix.

    Reference: `advjax/lipschitz/linear/spectral_norm.py` derives the upper bound and its margin for
    rounding.
    """
    return Dense(_floating(kernel)).norm()


def conv_norm(
    kernel: Float[ArrayLike, "*window in out"],
    input_shape: tuple[int, ...],
    *,
    strides: int | Sequence[int] = 1,
    padding: Padding = "SAME",
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> NormBound:
    """Bound the operator norm of a convolution with zero padding from both sides.

    The norm is that of the layer as it is, on images of this size: not of its kernel reshaped to a
    matrix, nor of a cyclic convolution.

    Args:
        kernel: The kernel, HWIO; "in" counts the input channels of one group. There may be any
            number of spatial axes.
        input_shape: The shape (H, W, C) of one image.
        strides: The stride of all axes, or of each.
        padding: "SAME", "VALID", or the zeros `(low, high)` added to each axis.
        dilation: The distance between the kernel's taps on all axes, or on each.
        groups: The number of groups of channels; that of the image's channels for a depthwise
            kernel.

    Returns:
        A `NormBound`. Both bounds have the gradient of the norm, 0 for a kernel of zeros.

    Raises:
        TypeError: If the kernel is not floating.
        ValueError: If the shapes do not fit together, or an option is none of those above.

    Reference: Sedghi et al. (2019) for cyclic convolutions; `advjax/lipschitz/linear/layers.py`
    derives strides, padding and the margin for rounding.
    """
    layer = Conv(
        _floating(kernel),
        input_shape,
        strides=strides,
        padding=padding,
        dilation=dilation,
        groups=groups,
    )
    return layer.norm()


def _matrix_bound(layer: Conv) -> Float[Array, ""]:
    """Bound the norm of the matrix of the convolution, or of its transpose."""
    like = jax.ShapeDtypeStruct(layer.input_shape, layer.kernel.dtype)
    out = jax.eval_shape(layer.apply, like)
    side: Any = like
    column: Callable[[Array], Array] = layer.apply
    if out.size < like.size:
        transpose = jax.linear_transpose(layer.apply, like)
        side, column = out, lambda y: transpose(y)[0]
    basis = jnp.eye(side.size, dtype=like.dtype).reshape(side.size, *side.shape)
    return norm_bound(jax.vmap(column)(basis).reshape(side.size, -1))


def _frequency_bound(layer: Conv) -> Float[Array, ""]:
    """Bound the largest norm over the frequencies of a cyclic convolution that contains this one.

    Along an axis of stride s, tap t of the kernel reads for output o the input
    `s o + t dilation - low = s (o + q) + p` with a phase p in [0, s). So the convolution is one
    of stride 1 whose channels are the s phases of the input, and tap t reads block o + q of
    phase p. On a circle of M blocks (`Axis.circle`) the zero-padded convolution is the cyclic one
    with some inputs and outputs left out. Its norm is therefore at most the cyclic one's: the
    largest norm over the frequencies w of the matrix

        K(w)[(p, in), out] = sum over the taps of phase p of kernel[t, in, out] exp(2 pi i w q / M).

    The kernel is real, so that half the frequencies of the last axis suffice.

    Rounding: the weights exp(...) are rounded to nearest, with an error of u. An axis of k taps
    adds inner products of k terms, with an error of gamma(3 k) (`rounding.py`). All axes together
    have an error of gamma(sum of 3 k + 2) times the sum of the magnitudes over the taps of each
    phase. The norm of this matrix of magnitudes, times gamma, is added to the bound.
    """
    kernel, axes = layer.kernel, layer.axes
    phases = [_phases(axis) for axis in axes]
    sizes = [len(phase) for phase in phases[:-1]] + [len(phases[-1]) // 2 + 1]
    frequencies = np.array(list(itertools.product(*map(range, sizes))))
    scale = power_of_two(kernel)
    unit = kernel / scale
    complex_dtype = jnp.promote_types(kernel.dtype, jnp.complex64)
    tables = [jnp.asarray(phase, complex_dtype) for phase in phases]
    shape = (math.prod(axis.stride for axis in axes) * kernel.shape[-2], kernel.shape[-1])

    def bound(frequency: Int[Array, " axes"]) -> Float[Array, ""]:
        chosen = [table[index] for table, index in zip(tables, frequency, strict=True)]
        return norm_bound(weighted_taps(chosen, unit).reshape(shape))

    batch = max(1, min(len(frequencies), BATCH // (shape[0] * shape[1])))
    largest = jnp.max(jax.lax.map(bound, jnp.asarray(frequencies), batch_size=batch))
    taps = [jnp.asarray(np.abs(phase[0]), kernel.dtype) for phase in phases]
    magnitudes = weighted_taps(taps, jnp.abs(unit)).reshape(shape)
    terms = sum(3 * axis.window + 2 for axis in axes)
    # Doubled, as the sum of the magnitudes is itself rounded, but by less than a factor of 2.
    rounding = 2 * gamma(terms, kernel.dtype) * magnitude_bound(magnitudes)
    return scale * (largest + rounding) * (1 + gamma(4, kernel.dtype))


def turns_of(circle: int, offsets: np.ndarray) -> Float[np.ndarray, "frequencies taps"]:
    """The phase of each frequency of a circle at each offset, in turns, in [0, 1)."""
    # Reduced as an exact integer: a large angle would lose its digits.
    return np.outer(np.arange(circle), offsets) % circle / circle


def _phases(axis: Axis) -> Complex[np.ndarray, "frequencies phases taps"]:
    """`exp(2 pi i w q / M)` for each frequency w and tap, at the phase of the tap, in float64."""
    q, p = np.divmod(axis.offsets, axis.stride)
    turns = turns_of(axis.circle, q)
    at_phase = np.arange(axis.stride)[:, None] == p
    return np.where(at_phase, np.exp(2j * np.pi * turns)[:, None, :], 0)


def weighted_taps(tables: Sequence[Array], kernel: Float[Array, "*window in out"]) -> Array:
    """Sum the taps along each axis, with the weights (phase, tap) of the axis's table.

    For an axis of k taps these are inner products of k terms, with a relative error of gamma(3 k)
    if the weights are complex (`rounding.py`).
    """
    for axis, table in enumerate(tables):
        product = jnp.tensordot(table, kernel, (1, axis), precision=jax.lax.Precision.HIGHEST)
        kernel = jnp.moveaxis(product, 0, axis)
    return kernel
