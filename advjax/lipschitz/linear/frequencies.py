"""Layers of a chain in the frequency domain of cyclic grids that contain zero-padded convolutions.

On circles that are large enough (`Axis.circle`) a chain of convolutions with zero padding is one of
cyclic convolutions, if what lies outside of each layer's outputs is set to 0. That is the work of
an activation whose slope is 0 there, in the range of all the others, so that what holds for the
cyclic chain holds for the padded one.

Let `z^(w)` be the unitary Fourier transform of a layer's inputs, the channels at frequency w of a
circle of N pixels. The layer reads at output o the inputs `s o + offset` of each tap. Its outputs
are on a circle of M = N / s, and

    y^(w) = s^(-1/2) sum over the s aliases v = w (mod M) of K(v)^H z^(v),
    K(v)[in, out] = sum over the taps of kernel[tap, in, out] exp(-2 pi i v offset / N).

So a layer of stride s takes the direct sum of the inputs at s frequencies, and a dense layer behind
an image, whose window is the image, takes that of all of them. By Parseval's theorem lengths and
inner products are sums over the frequencies.

Reference: Pauli, Gramlich and Allgoewer (2023), arXiv:2211.15253, for convolutions in LipSDP, one
axis of them and in state space.
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
    """The matrices K of a layer, times `s^(-1/2)`: one matrix for a dense layer after another.

    Attributes:
        values: For each frequency of the inputs.
        magnitudes: The sums of the magnitudes of what each entry is a sum of.
        relative: Each of the values is off by at most this times its magnitude.
    """

    values: Inexact[Array, "*grid in out"]
    magnitudes: Float[Array, "in out"]
    relative: float


def grids(layers: Sequence[Layer]) -> list[Grid]:
    """The circles before the first layer and after each; convolutions come before dense layers."""
    convolutions = [layer for layer in layers if isinstance(layer, Conv)]
    found: list[Grid] = [()] * (len(layers) + 1)
    if not convolutions:
        return found
    strides = [[axis.stride for axis in layer.axes] for layer in convolutions]
    needed = [[axis.circle for axis in layer.axes] for layer in convolutions]
    # By how much the circle behind each layer is larger than that behind the last.
    larger = np.cumprod([[1] * len(strides[0]), *strides[:0:-1]], axis=0)[::-1]
    behind = larger * np.max(-(-np.array(needed) // larger), axis=0)
    for i, circle in enumerate([behind[0] * strides[0], *behind]):
        found[i] = tuple(map(int, circle))
    return found


def spectra(layers: Sequence[Layer]) -> list[Spectrum]:
    """Transform each layer to the frequencies of its inputs, with room for four roundings."""
    shape: tuple[int, ...] = ()
    found = []
    for layer, (before, behind) in zip(layers, itertools.pairwise(grids(layers)), strict=True):
        offsets: list[np.ndarray] = []
        window = layer.kernel
        if isinstance(layer, Conv):
            offsets = [axis.offsets for axis in layer.axes]
            window = _ungrouped(layer.kernel, layer.groups)
        elif before:  # a window of the image's size
            offsets = [np.arange(size) for size in shape[:-1]]
            window = layer.kernel.reshape(*shape, layer.kernel.shape[-1])
        found.append(_spectrum(window, offsets, before, behind))
        shape = layer.output_shape
    return found


def fold(matrices: Inexact[Array, "*grid dims units"], grid: Grid) -> Inexact[Array, "..."]:
    """Stack the rows of all aliases: the matrices on the circle after a layer.

    Where that is none, the one matrix is real: it has the real parts and the imaginary ones as
    rows, which gives the same real combinations of rows the same length.
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
    behind: Grid,
) -> Spectrum:
    kernel = kernel / math.sqrt(math.prod(before) / math.prod(behind))
    dtype = jnp.promote_types(kernel.dtype, jnp.complex64) if before else kernel.dtype
    tables = [
        jnp.asarray(np.exp(-2j * np.pi * turns_of(circle, offset)), dtype)
        for circle, offset in zip(before, offsets, strict=True)
    ]
    magnitudes = jnp.sum(jnp.abs(kernel), axis=tuple(range(len(before))))
    # The weights are the nearest floating numbers; the sums err as `weighted_taps` says. Doubled,
    # since that of the magnitudes is itself computed, to within a factor of 2.
    terms = sum(3 * len(offset) + 2 for offset in offsets)
    relative = (4 + 2 * terms) * float(jnp.finfo(kernel.dtype).eps)
    return Spectrum(weighted_taps(tables, kernel), magnitudes, relative)


def _ungrouped(
    kernel: Float[Array, "*window in out"], groups: int
) -> Float[Array, "*window all out"]:
    """The kernel that sees all channels, with zeros where it reads another group's."""
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
