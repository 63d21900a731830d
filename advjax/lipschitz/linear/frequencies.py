"""A chain of zero-padded convolutions in the frequency domain, embedded in cyclic grids (circles).

On large enough circles (`Axis.circle`) a chain of zero-padded convolutions is a chain of cyclic
convolutions that sets to 0 whatever lies outside each layer's outputs. Setting an entry to 0 is an
activation of slope 0, and a bound for all slopes between 0 and the largest allows for it. So a
bound of the cyclic chain also holds for the zero-padded one.

Let `z^(w)` be the unitary Fourier transform of a layer's inputs: the channels at frequency w of a
circle of N pixels. For output o, each tap of the kernel reads the input `s o + offset`. The outputs
are on a circle of M = N / s pixels, and

    y^(w) = s^(-1/2) sum over the s aliases v = w (mod M) of K(v)^H z^(v),
    K(v)[in, out] = sum over the taps of kernel[tap, in, out] exp(-2 pi i v offset / N).

So a layer of stride s maps s frequencies of its input to one of its output. A dense layer after an
image is a convolution whose window is the whole image: it maps all frequencies to one. By
Parseval's theorem, norms and inner products are sums over the frequencies.

Reference: Pauli, Gramlich and Allgoewer (2023), arXiv:2211.15253, treat convolutions in LipSDP by
state-space models, along one axis.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Inexact, PyTree

from advjax.lipschitz.linear.layers import BATCH, Conv, Layer, turns_of, weighted_taps

Grid = tuple[int, ...]
"""The sizes of a circle for each spatial axis; empty for a vector."""


class Spectrum(NamedTuple):
    """The matrices `s^(-1/2) K` of a layer, one for each frequency; a single one without pixels.

    Attributes:
        values: The matrix at each frequency of the inputs.
        magnitudes: For each entry, the sum of the absolute values of the terms that it sums.
        relative: The error of each value, at most, divided by its entry of `magnitudes`.
    """

    values: Inexact[Array, "*grid in out"]
    magnitudes: Float[Array, "in out"]
    relative: float


def grids(layers: Sequence[Layer]) -> list[Grid]:
    """Find the circles before the first layer and after each; dense layers come last."""
    convolutions = [layer for layer in layers if isinstance(layer, Conv)]
    found: list[Grid] = [()] * (len(layers) + 1)
    if not convolutions:
        return found
    strides = [[axis.stride for axis in layer.axes] for layer in convolutions]
    needed = [[axis.circle for axis in layer.axes] for layer in convolutions]
    # How many times larger the circle after each convolution is than that after the last one:
    # each must hold the cyclic convolution of its layer, and shrink by exactly the strides.
    larger = np.cumprod([[1] * len(strides[0]), *strides[:0:-1]], axis=0)[::-1]
    after = larger * np.max(-(-np.array(needed) // larger), axis=0)
    for i, circle in enumerate([after[0] * strides[0], *after]):
        found[i] = tuple(map(int, circle))
    return found


def spectra(layers: Sequence[Layer]) -> list[Spectrum]:
    """Transform each layer to the frequencies of its inputs.

    The error bounds leave room for four roundings of the kernel, such as products with slopes.
    """
    shape: tuple[int, ...] = ()
    found = []
    for layer, (before, after) in zip(layers, itertools.pairwise(grids(layers)), strict=True):
        offsets: list[np.ndarray] = []
        window = layer.kernel
        if isinstance(layer, Conv):
            offsets = [axis.offsets for axis in layer.axes]
            window = _ungrouped(layer.kernel, layer.groups)
        elif before:  # a window of the image's size
            offsets = [np.arange(size) for size in shape[:-1]]
            window = layer.kernel.reshape(*shape, layer.kernel.shape[-1])
        found.append(_spectrum(window, offsets, before, after))
        shape = layer.output_shape
    return found


def fold(matrices: Inexact[Array, "*grid dims units"], grid: Grid) -> Inexact[Array, "..."]:
    """Stack the rows of all frequencies that alias to the same one on the circle after a layer.

    Where a vector follows, all are stacked to one matrix A, and the real matrix of the rows of
    Re(A) and Im(A) is returned: both map a real x to vectors of the same length.
    """
    before, units = matrices.shape[:-2], matrices.shape[-1]
    if before == grid:
        return matrices
    rank = len(before)
    each = [(n // m, m) for n, m in zip(before, grid or (1,) * rank, strict=True)]
    split = matrices.reshape(*itertools.chain(*each), *matrices.shape[-2:])
    aliases, frequencies = range(0, 2 * rank, 2), range(1, 2 * rank, 2)
    moved = split.transpose(*frequencies, *aliases, 2 * rank, 2 * rank + 1)
    folded = moved.reshape(*(m for _, m in each), -1, units)
    if grid:
        return folded
    (only,) = folded.reshape(1, -1, units)
    return jnp.concatenate([only.real, only.imag])


def _spectrum(
    kernel: Float[Array, "*window in out"],
    offsets: Sequence[np.ndarray],
    before: Grid,
    after: Grid,
) -> Spectrum:
    kernel = kernel / math.sqrt(math.prod(before) / math.prod(after))
    dtype = jnp.promote_types(kernel.dtype, jnp.complex64) if before else kernel.dtype
    tables = [
        jnp.asarray(np.exp(-2j * np.pi * turns_of(circle, offset)), dtype)
        for circle, offset in zip(before, offsets, strict=True)
    ]
    magnitudes = jnp.sum(jnp.abs(kernel), axis=tuple(range(len(before))))
    # The weights are rounded to nearest, and the error of the sums is that of `weighted_taps`.
    # Doubled, as the sum of the magnitudes is itself rounded, but by less than a factor of 2.
    terms = sum(3 * len(offset) + 2 for offset in offsets)
    relative = (4 + 2 * terms) * float(jnp.finfo(kernel.dtype).eps)
    return Spectrum(weighted_taps(tables, kernel), magnitudes, relative)


def _ungrouped(
    kernel: Float[Array, "*window in out"], groups: int
) -> Float[Array, "*window all out"]:
    """The kernel of the same convolution without groups: 0 between channels of two groups."""
    if groups == 1:
        return kernel
    *window, inputs, outputs = kernel.shape
    split = kernel.reshape(*window, inputs, groups, outputs // groups)
    return jnp.einsum("...igo,gh->...higo", split, jnp.eye(groups, dtype=kernel.dtype)).reshape(
        *window, groups * inputs, outputs
    )


def over_frequencies(
    function: Callable[..., PyTree[Array]], *matrices: Inexact[Array, "*grid rows cols"]
) -> PyTree[Array]:
    """Apply a function to the matrices at each frequency, in batches that fit in memory."""
    grid = matrices[0].shape[:-2]
    if not grid:
        return function(*matrices)
    flat = [array.reshape(-1, *array.shape[-2:]) for array in matrices]
    batch = max(1, BATCH // max(array[0].size for array in flat))
    if batch >= len(flat[0]):
        found = jax.vmap(function)(*flat)
    else:
        found = jax.lax.map(lambda each: function(*each), tuple(flat), batch_size=batch)
    return jax.tree.map(lambda leaf: leaf.reshape(*grid, *leaf.shape[1:]), found)
