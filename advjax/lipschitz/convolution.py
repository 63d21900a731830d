"""Convolutions with zero padding as linear functions, and upper bounds of their norms."""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float

from advjax.lipschitz.estimates import power_of_two
from advjax.lipschitz.gram import SQUARINGS, gamma, magnitude_bound, norm_bound

_ENTRIES = 2**24  # of a convolution that is written as a matrix: at most these,
_PRODUCTS = 2**34  # and so many multiplications to bound it
BATCH = 2**22  # entries of the matrices of the frequencies that are bounded at once


class Axis(NamedTuple):
    """A spatial axis of a convolution."""

    size: int
    window: int
    stride: int
    low: int
    high: int
    dilation: int

    @property
    def out_size(self) -> int:
        """How many outputs there are along the axis."""
        covered = (self.window - 1) * self.dilation + 1
        return max((self.size + self.low + self.high - covered) // self.stride + 1, 0)

    @property
    def offsets(self) -> np.ndarray:
        """Where each tap reads the input, from where the first output is."""
        return np.arange(self.window) * self.dilation - self.low

    @property
    def circle(self) -> int:
        """How many outputs a cyclic convolution has at least that contains this one.

        Output o reads the inputs `stride o + offset`, of the block `o + q` of `stride` inputs. Let
        J be the number of blocks, n the number of outputs, and [first, last] the range of o + q. On
        a circle of M blocks with

            M >= max(J, n, J - first, last + 1)

        a block outside [0, J) does not come to lie on an input: it stays a zero.
        """
        q = self.offsets // self.stride
        blocks = -(-self.size // self.stride)
        first, last = int(q[0]), int(q[-1]) + self.out_size - 1
        return max(blocks, self.out_size, blocks - first, last + 1)


class Convolution(NamedTuple):
    """All of a convolution but its kernel, which is HWIO with any number of spatial axes."""

    axes: tuple[Axis, ...]
    groups: int = 1

    def input_shape(self, kernel_shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of one image, its channels last."""
        return (*(axis.size for axis in self.axes), kernel_shape[-2] * self.groups)

    def output_shape(self, kernel_shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of what it makes of one image, its channels last."""
        return (*(axis.out_size for axis in self.axes), kernel_shape[-1])

    def apply(
        self, kernel: Float[Array, "*window in out"], x: Float[Array, "*shape"]
    ) -> Float[Array, "*out"]:
        """The convolution of one image."""
        rank = len(self.axes)
        spatial = tuple(range(rank))
        channels_last = (0, rank + 1, *(axis + 1 for axis in spatial))
        return jax.lax.conv_general_dilated(
            x[None],
            kernel,
            window_strides=[axis.stride for axis in self.axes],
            padding=[(axis.low, axis.high) for axis in self.axes],
            rhs_dilation=[axis.dilation for axis in self.axes],
            dimension_numbers=jax.lax.ConvDimensionNumbers(
                channels_last, (rank + 1, rank, *spatial), channels_last
            ),
            feature_group_count=self.groups,
            precision=jax.lax.Precision.HIGHEST,
        )[0]

    def bound(self, kernel: Float[Array, "*window in out"]) -> Float[Array, ""]:
        """An upper bound of the operator norm; infinite unless it is finite."""
        if not kernel.size or not math.prod(self.input_shape(kernel.shape)):
            return jnp.zeros((), kernel.dtype)
        *window, inputs, outputs = kernel.shape
        one = self._replace(groups=1)
        group_bound = one.frequency_bound
        if self._is_small(inputs, outputs // self.groups):
            group_bound = one.matrix_bound
        # Groups see different inputs and make different outputs: the norm is their maximum.
        split = kernel.reshape(*window, inputs, self.groups, outputs // self.groups)
        entries = math.prod(axis.size for axis in self.axes) * kernel.size // self.groups
        batch = max(1, min(self.groups, BATCH // entries))
        return jnp.max(jax.lax.map(group_bound, jnp.moveaxis(split, -2, 0), batch_size=batch))

    def _is_small(self, inputs: int, outputs: int) -> bool:
        """Whether all groups are cheap to bound as matrices, which is tighter."""
        small, large = sorted(
            [
                math.prod(axis.size for axis in self.axes) * inputs,
                math.prod(axis.out_size for axis in self.axes) * outputs,
            ]
        )
        products = self.groups * small**2 * (large + SQUARINGS * small)
        return small * large <= _ENTRIES and products <= _PRODUCTS

    def matrix_bound(self, kernel: Float[Array, "*window in out"]) -> Float[Array, ""]:
        """The bound of the matrix or its transpose; its entries are the kernel's, or 0."""
        like = jax.ShapeDtypeStruct(self.input_shape(kernel.shape), kernel.dtype)

        def convolve(x):
            return self.apply(kernel, x)

        side, column, out = like, convolve, jax.eval_shape(convolve, like)
        if out.size < like.size:
            transpose = jax.linear_transpose(convolve, like)
            side, column = out, lambda y: transpose(y)[0]
        basis = jnp.eye(side.size, dtype=kernel.dtype).reshape(side.size, *side.shape)
        return norm_bound(jax.vmap(column)(basis).reshape(side.size, -1))

    def frequency_bound(self, kernel: Float[Array, "*window in out"]) -> Float[Array, ""]:
        """The largest norm over the frequencies of a cyclic convolution that contains this one.

        Along an axis of stride s, tap t of the kernel reads for output o the input
        `s o + t dilation - low = s (o + q) + p` with a phase p in [0, s). So the convolution is one
        of stride 1 whose channels are the s phases of the input, and tap t reads block o + q of
        phase p. On a circle of M blocks, as `Axis.circle` has it, the zero-padded convolution is
        the cyclic one with inputs and outputs left out, and its norm is at most the cyclic one's:
        the largest norm over the frequencies w of the matrix
        K(w)[(p, in), out] = sum over the taps of phase p of kernel[t, in, out] exp(2 pi i w q / M).
        The kernel is real, so that half the frequencies of the last axis suffice.

        Rounding: the weights exp(...) are the nearest floating numbers, off by u. An axis of k taps
        adds inner products of k terms, off by gamma(3 k) as `gram.py` shows. All axes together are
        off by gamma(sum of 3 k + 2) times the sum of the magnitudes over the taps of each phase;
        the norm of that matrix of magnitudes times gamma is added.
        """
        phases = [_phases(axis) for axis in self.axes]
        sizes = [len(phase) for phase in phases[:-1]] + [len(phases[-1]) // 2 + 1]
        frequencies = np.array(list(itertools.product(*map(range, sizes))))
        scale = power_of_two(kernel)
        unit = kernel / scale
        complex_dtype = jnp.promote_types(kernel.dtype, jnp.complex64)
        tables = [jnp.asarray(phase, complex_dtype) for phase in phases]
        shape = (math.prod(axis.stride for axis in self.axes) * kernel.shape[-2], kernel.shape[-1])

        def bound(frequency):
            chosen = [table[index] for table, index in zip(tables, frequency, strict=True)]
            return norm_bound(weighted_taps(chosen, unit).reshape(shape))

        batch = max(1, min(len(frequencies), BATCH // (shape[0] * shape[1])))
        largest = jnp.max(jax.lax.map(bound, jnp.asarray(frequencies), batch_size=batch))
        taps = [jnp.asarray(np.abs(phase[0]), kernel.dtype) for phase in phases]
        magnitudes = weighted_taps(taps, jnp.abs(unit)).reshape(shape)
        terms = sum(3 * axis.window + 2 for axis in self.axes)
        # Twice, since the sum of the magnitudes is itself computed, to within a factor of 2.
        rounding = 2 * gamma(terms, kernel.dtype) * magnitude_bound(magnitudes)
        return scale * (largest + rounding) * (1 + gamma(4, kernel.dtype))


def turns_of(circle: int, offsets: np.ndarray) -> Float[np.ndarray, "frequencies taps"]:
    """The turn by which each frequency of a circle moves on over each offset, in [0, 1)."""
    # An exact integer before it is divided.
    return np.outer(np.arange(circle), offsets) % circle / circle


def _phases(axis: Axis) -> Complex[np.ndarray, "frequencies phases taps"]:
    """`exp(2 pi i w q / M)` for each frequency w and tap, at the phase of the tap, in float64."""
    q, p = np.divmod(axis.offsets, axis.stride)
    turns = turns_of(axis.circle, q)
    at_phase = np.arange(axis.stride)[:, None] == p
    return np.where(at_phase, np.exp(2j * np.pi * turns)[:, None, :], 0)


def weighted_taps(tables: Sequence[Array], kernel: Float[Array, "*window in out"]) -> Array:
    """The taps of every axis summed with the weights (phase, tap) of its table.

    An axis of k taps adds inner products of k terms, off by gamma(3 k) as `gram.py` shows if the
    weights are complex.
    """
    for axis, table in enumerate(tables):
        product = jnp.tensordot(table, kernel, (1, axis), precision=jax.lax.Precision.HIGHEST)
        kernel = jnp.moveaxis(product, 0, axis)
    return kernel
