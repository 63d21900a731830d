"""Bounds of a chain of convolutions and dense layers, tighter than the product of their norms.

Let v be the difference of two inputs of the chain. Suppose that the difference after some layer is
`S w` with |w| <= |v| for a known matrix S, the identity at first. Let B = W^H S for the next
layer's kernel W, multiplied by the largest slopes of its activation, so that the difference before
the activation is y = B w and the slopes that remain are in [0, 1]. For the difference z after the
activation this means z^H D^2 (y - z) >= 0 for every diagonal D > 0, and with A = D B / 2

    |D z|^2 <= (D z)^H (D B) w <= |w|^2 + |A^H D z|^2,   so   z^H D P D z <= |w|^2,   P = I - A A^H.

Hence, for any T with T^H P T >= (1 - e) I, the difference after the activation is `D^-1 T w` for a
new w with sqrt(1 - e) |w| <= |v|, and that of the chain is `W^H D^-1 T w` for its last kernel W. If
T is the inverse of the adjoint Cholesky factor of P, e is 0 up to rounding.

This holds for every D, so that the search for D need not be certified. Only the rounding of three
products matters: A A^H, T^H P T and the last one. `rounding.rounding` bounds the error of each, and
e is the computed difference of T^H P T from I, plus that error.

For convolutions the same is done at each frequency (`frequencies.py`). The condition on the slopes
is then a sum over the frequencies, so that D has one entry per channel; all else is the same.

Reference: Fazlyab et al. (2019) for the condition, LipSDP; Xu and Sivaranjani (2024) for solving it
layer by layer, ECLipsE.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Inexact

from advjax import checks
from advjax.lipschitz.linear import frequencies
from advjax.lipschitz.linear.frequencies import Grid, Spectrum
from advjax.lipschitz.linear.layers import Conv, Dense, Layer
from advjax.lipschitz.linear.norms import upper_norm
from advjax.lipschitz.linear.rounding import (
    gamma,
    magnitude_bound,
    power_of_two,
    rounding,
)
from advjax.lipschitz.linear.rounding import product as matrix_product
from advjax.lipschitz.linear.spectral_norm import norm_bound

Layers = Sequence[Float[ArrayLike, "in out"] | Layer]
Slopes = Sequence[Float[ArrayLike, "*units"]]


class ChainBound(NamedTuple):
    """Lipschitz bounds, in L2, of the outputs of a chain of layers.

    Attributes:
        constant: The bound for all outputs together.
        outputs: The bound for each output; for a convolution, for any pixel of each channel.
        pairs: The bound for the difference of each two outputs; for a convolution, for that of two
            channels of a pixel.
    """

    constant: Float[Array, ""]
    outputs: Float[Array, " units"]
    pairs: Float[Array, "units units"]


Method = Callable[[Layers, Slopes], ChainBound]
"""A bound for chains: `product`, `eclipse`, `lipsdp`, or a function like them."""


def product(layers: Layers, slopes: Slopes) -> ChainBound:
    """Bound a chain of layers by the product of their norms.

    Args:
        layers: Convolutions (`Conv`), if any, and then dense layers, each a `Dense` or the matrix
            of `y = z @ kernel`. The first dense layer takes the image flattened row by row, the
            channels of a pixel side by side.
        slopes: The largest slope of the activation after each layer but the last: a scalar, or one
            for each unit, or for each channel of a convolution. The activations must not decrease.
            The slope of a ReLU is 1, of a sigmoid 1/4.

    Returns:
        A `ChainBound`, certified: rounding is accounted for. It is infinite if a kernel is not
        finite.

    Raises:
        TypeError: If a kernel is not floating.
        ValueError: If the layers do not fit together, or there is not one slope between each two.

    Reference: Szegedy et al. (2013), section 4.3.
    """
    return _product(_chain(layers, slopes))


def eclipse(layers: Layers, slopes: Slopes) -> ChainBound:
    """Bound a chain of layers with one multiplier per layer, in closed form.

    Args:
        layers: Convolutions (`Conv`), if any, and then dense layers, each a `Dense` or a matrix
            (in, out).
        slopes: The largest slope of the activation after each layer but the last; a scalar, or one
            for each unit or channel.

    Returns:
        A `ChainBound`, certified, and no larger than that of `product`.

    Raises:
        TypeError: If a kernel is not floating.
        ValueError: If the layers do not fit together, or there is not one slope between each two.

    Reference: Xu and Sivaranjani (2024), ECLipsE-Fast.
    """
    chain = _chain(layers, slopes)
    return _smaller(_product(chain), _certified(chain, _start(chain)))


def lipsdp(
    layers: Layers, slopes: Slopes, *, num_steps: int = 100, learning_rate: float = 0.3
) -> ChainBound:
    """Bound a chain of layers with one multiplier per unit or channel, found by gradient descent.

    This is the semidefinite program of LipSDP without a semidefinite solver. Eliminated layer by
    layer, it has a feasible point for every choice of multipliers, so that each step of Adam gives
    a valid bound.

    Args:
        layers: Convolutions (`Conv`), if any, and then dense layers, each a `Dense` or a matrix
            (in, out).
        slopes: The largest slope of the activation after each layer but the last; a scalar, or one
            for each unit or channel.
        num_steps: Number of steps of Adam. The bound after 100 is within about 0.2 % of that after
            1,000.
        learning_rate: The initial learning rate of Adam, which falls to 0 along a cosine.

    Returns:
        A `ChainBound`, certified, and no larger than that of `eclipse`. The multipliers minimise
        the constant of all outputs together; the bounds of single outputs and of pairs use the same
        ones.

    Raises:
        TypeError: If a kernel is not floating.
        ValueError: If the layers do not fit together, there is not one slope between each two,
            `num_steps` is not a positive integer or `learning_rate` not positive.

    Reference: Fazlyab et al. (2019), LipSDP-Neuron.
    """
    num_steps = checks.positive_int("num_steps", num_steps)
    rate = checks.number("learning_rate", learning_rate, minimum=0, exclusive=True)
    chain = _chain(layers, slopes)
    if len(chain) == 1:
        return _product(chain)
    best = jax.lax.stop_gradient(_descend(chain, num_steps=num_steps, learning_rate=rate))
    found = [_certified(chain, multipliers) for multipliers in (_start(chain), best)]
    return _smaller(*found, _product(chain))


# The bounds, compiled once for the shapes of a chain

Chain = tuple[Layer, ...]


@jax.jit
def _product(chain: Chain) -> ChainBound:
    norms = [upper_norm(layer) + _scaling_error(layer.kernel) for layer in chain]
    last = chain[-1].kernel
    growth = functools.reduce(_times, norms[:-1], jnp.ones((), last.dtype))
    growth *= 1 + gamma(4 * len(chain), last.dtype)
    # A pixel of a convolution's output reads each tap at most once, each at another input.
    rows = last.reshape(-1, last.shape[-1])
    scale = power_of_two(rows)
    found = _bounds(_Reach(rows / scale, jnp.zeros((), last.dtype), scale, growth))
    if isinstance(chain[-1], Conv):
        found = found._replace(constant=_times(growth, norms[-1]))
    return found


@jax.jit
def _certified(chain: Chain, multipliers: list["_Multipliers"]) -> ChainBound:
    first, *rest = frequencies.spectra(chain)
    _, *grids = frequencies.grids(chain)
    return _bounds(_reach(_first(first, grids[0]), rest, grids[1:], multipliers))


@functools.partial(jax.jit, static_argnames=("num_steps", "learning_rate"))
def _descend(chain: Chain, *, num_steps: int, learning_rate: float) -> list["_Multipliers"]:
    """The multipliers of the lowest constant that Adam finds; nothing here need be certified."""
    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, num_steps))
    first, *rest = frequencies.spectra(chain)
    _, *grids = frequencies.grids(chain)
    reach = _first(first, grids[0])
    # The constant depends on this matrix by its Gram matrix alone, and so on the smaller factor R.
    reach = reach._replace(matrix=jnp.linalg.qr(reach.matrix, mode="r"))

    @jax.value_and_grad
    def log_constant(multipliers: list[_Multipliers]) -> Float[Array, ""]:
        last = _reach(reach, rest, grids[1:], multipliers)
        return jnp.log(jnp.max(_top(last.matrix))) / 2 + jnp.log(last.scale)

    def step(carry: tuple, _: None) -> tuple[tuple, None]:
        multipliers, state, best, lowest = carry
        value, grad = log_constant(multipliers)
        best = jax.tree.map(lambda a, b: jnp.where(value < lowest, a, b), multipliers, best)
        updates, state = optimizer.update(grad, state)
        following = optax.apply_updates(multipliers, updates)
        return (following, state, best, jnp.fmin(value, lowest)), None

    start = _start(chain)
    infinite = jnp.full((), jnp.inf, chain[0].kernel.dtype)
    carry = start, optimizer.init(start), start, infinite
    return jax.lax.scan(step, carry, length=num_steps)[0][2]


def _smaller(*bounds: ChainBound) -> ChainBound:
    return jax.tree.map(lambda *values: functools.reduce(jnp.minimum, values), *bounds)


class _Multipliers(NamedTuple):
    """The diagonal D of an activation, free of constraints.

    Attributes:
        units: The logarithms of the entries of D, up to a common factor.
        fraction: The factor: the sigmoid of this is the square of the norm of A, which must be
            below 1.
    """

    units: Float[Array, " units"]
    fraction: Float[Array, ""]


class _Reach(NamedTuple):
    """The differences `scale growth (matrix + E)^H w` that are possible after a layer.

    |w| is at most the length of the inputs' difference, and |E| at most the error. For convolutions
    these are Fourier transforms: one matrix for each frequency, all with the same error.
    """

    matrix: Inexact[Array, "*grid dims units"]
    error: Float[Array, ""]
    scale: Float[Array, ""]
    growth: Float[Array, ""]


def _start(chain: Chain) -> list[_Multipliers]:
    zero = jnp.zeros((), chain[0].kernel.dtype)
    sizes = [layer.kernel.shape[-1:] for layer in chain[:-1]]
    return [_Multipliers(jnp.zeros(size, zero.dtype), zero) for size in sizes]


def _first(spectrum: Spectrum, grid: Grid) -> _Reach:
    """The differences after the first layer."""
    one = jnp.ones((), spectrum.magnitudes.dtype)
    scale = power_of_two(spectrum.magnitudes)
    error = scale * spectrum.relative * magnitude_bound(spectrum.magnitudes / scale)
    return _scaled(_Reach(frequencies.fold(spectrum.values, grid), error, one, one))


def _reach(
    reach: _Reach, rest: list[Spectrum], grids: list[Grid], multipliers: list[_Multipliers]
) -> _Reach:
    """The differences after the last layer."""
    for spectrum, grid, multiplier in zip(rest, grids, multipliers, strict=True):
        reach = _follow(reach, multiplier, spectrum, grid)
    return reach


def _scaled(reach: _Reach) -> _Reach:
    """Scale the matrix by a power of two to entries of order 1."""
    power = jax.lax.stop_gradient(power_of_two(reach.matrix))
    # A scale that underflows is rounded up: it stays a power of two.
    scale = jnp.maximum(reach.scale * power, jnp.finfo(reach.scale.dtype).tiny)
    return _Reach(reach.matrix / power, reach.error / power, scale, reach.growth)


def _follow(reach: _Reach, multipliers: _Multipliers, spectrum: Spectrum, grid: Grid) -> _Reach:
    """Go through an activation and the layer after it.

    An elementwise operation has a relative error below eps: in norm, an error below eps times the
    norm of the matrix of magnitudes.
    """
    eps = float(jnp.finfo(reach.error.dtype).eps)
    units = jnp.exp(multipliers.units)
    top = jnp.max(_top(reach.matrix * _along_last(units, reach.matrix)))
    size = jnp.sqrt(jax.nn.sigmoid(multipliers.fraction) / jnp.where(top > 0, top, 1))
    half = size * units  # D / 2, exactly
    scale = jax.lax.stop_gradient(power_of_two(spectrum.magnitudes))
    kernel_error = magnitude_bound(spectrum.magnitudes / scale / (2 * half)[:, None])
    kernel_error *= spectrum.relative + 4 * eps
    eye = jnp.eye(len(half), dtype=reach.matrix.dtype)

    def follow(matrix: Inexact[Array, "dims units"], values: Inexact[Array, "units out"]) -> tuple:
        A = matrix * half[None]
        A_error = jnp.max(half) * reach.error + eps * magnitude_bound(A)
        P = eye - matrix_product(A, A)
        P_error = rounding(A, A) + A_error * (2 * norm_bound(A) + A_error) + eps
        factor = jnp.linalg.cholesky(P)
        T = jax.scipy.linalg.solve_triangular(factor, eye, lower=True).conj().T
        T_norm = norm_bound(T)
        PT = matrix_product(P, T)
        excess = eye - matrix_product(T, PT)
        excess_error = rounding(T, PT) + T_norm * (rounding(P, T) + P_error * T_norm) + eps
        e = (magnitude_bound(excess) + excess_error) * (1 + 16 * eps)

        weighted = values / scale / (2 * half)[:, None]
        error = rounding(T, weighted) + kernel_error * T_norm
        return matrix_product(T, weighted), error, e

    after, error, e = frequencies.over_frequencies(follow, reach.matrix, spectrum.values)
    growth = reach.growth * (1 + 8 * eps) / jnp.sqrt(1 - jnp.max(e))
    # `fold` stacks the aliases, whose kernels have a factor s^(-1/2): the squares of their errors
    # are averaged at most, and the average is no larger than the largest.
    after = frequencies.fold(after, grid)
    return _scaled(_Reach(after, jnp.max(error), _times(reach.scale, scale), growth))


def _scaling_error(kernel: Float[Array, "*window in out"]) -> Float[Array, ""]:
    """Bound the norm of the rounding errors of a layer's products with the slopes."""
    magnitudes = jnp.sum(jnp.abs(kernel), axis=tuple(range(kernel.ndim - 2)))
    scale = power_of_two(magnitudes)
    return scale * magnitude_bound(magnitudes / scale) * 2 * float(jnp.finfo(kernel.dtype).eps)


def _top(matrices: Inexact[Array, "*grid rows cols"]) -> Float[Array, "*grid"]:
    """The squares of the norms, not certified: by an eigenvalue solver."""

    def top(matrix: Inexact[Array, "rows cols"]) -> Float[Array, ""]:
        if len(matrix) < matrix.shape[1]:
            matrix = matrix.T
        return jnp.linalg.eigvalsh(matrix_product(matrix, matrix))[-1]

    return frequencies.over_frequencies(top, matrices)


def _bounds(reach: _Reach) -> ChainBound:
    eps = float(jnp.finfo(reach.error.dtype).eps)
    *grid, dims, _ = reach.matrix.shape
    count = math.prod(grid)
    rounded_up = 1 + gamma(count * dims + 16, reach.error.dtype)
    factor = _times(reach.scale, reach.growth) * rounded_up

    def lengths(vectors: Inexact[Array, "*grid dims units"]) -> Float[Array, " units"]:
        # A pixel's output is the mean over the frequencies, up to a phase at each.
        square = jnp.sum(jnp.abs(vectors) ** 2, axis=tuple(range(len(grid) + 1)))
        return jnp.sqrt(square / count)

    # The error of a difference of two columns is E times (1, -1), of length sqrt(2), and its own
    # rounding.
    columns = jnp.moveaxis(reach.matrix, -1, 0)
    pairs = jax.lax.map(lambda column: lengths(column[..., None] - reach.matrix), columns)
    norm = jnp.max(frequencies.over_frequencies(norm_bound, reach.matrix))
    return ChainBound(
        constant=_times(factor, norm + reach.error),
        outputs=_times(factor, lengths(reach.matrix) + reach.error),
        pairs=_times(factor, pairs + math.sqrt(2) * (1 + eps) * reach.error),
    )


def _times(factor: Float[Array, ""], bounds: Float[Array, "*bounds"]) -> Float[Array, "*bounds"]:
    """Multiply, rounding up where the product underflows; infinite where it is NaN."""
    product = factor * bounds
    positive = (factor > 0) & (bounds > 0)
    product = jnp.where(positive, jnp.maximum(product, jnp.finfo(product.dtype).tiny), product)
    return jnp.where(jnp.isfinite(product), product, jnp.inf)


def _chain(layers: Layers, slopes: Slopes) -> Chain:
    """The layers, each multiplied by the roots of the slopes before and after it."""
    if not all(isinstance(x, Conv) or jnp.ndim(_kernel(x)) == 2 for x in layers):
        raise _misfit([_kernel(x) for x in layers])
    chain = [x if isinstance(x, Dense | Conv) else Dense(_kernel(x)) for x in layers]
    if not chain or not all(itertools.starmap(_follows, itertools.pairwise(chain))):
        raise _misfit([layer.kernel for layer in chain])
    if len(slopes) != len(chain) - 1:
        raise ValueError(
            f"slopes: {len(slopes)} for {len(chain)} layers, expected one between each two."
        )
    dtype = jnp.result_type(*(layer.kernel for layer in chain))
    # The root of each slope on either side, so that a unit of slope 0 leaves the chain altogether.
    rounded_up = 1 + 2 * float(jnp.finfo(dtype).eps)
    roots = [
        jnp.sqrt(jnp.broadcast_to(jnp.asarray(slope, dtype), layer.output_shape[-1:])) * rounded_up
        for slope, layer in zip(slopes, chain[:-1], strict=True)
    ]
    kernels = [layer.kernel.astype(dtype) for layer in chain]
    for i, root in enumerate(roots):
        kernels[i] *= _along_last(root, kernels[i])
        kernels[i + 1] = _times_inputs(chain[i + 1], kernels[i + 1], root)
    return tuple(
        dataclasses.replace(layer, kernel=kernel)
        for layer, kernel in zip(chain, kernels, strict=True)
    )


def _kernel(layer: Float[ArrayLike, "in out"] | Layer) -> Float[Array, "*kernel"]:
    return checks.floating("layers", layer.kernel if isinstance(layer, Dense | Conv) else layer)


def _misfit(kernels: Sequence[Float[Array, "*kernel"]]) -> ValueError:
    return ValueError(
        f"layers: kernels of shapes {[kernel.shape for kernel in kernels]}, expected "
        "convolutions, if any, and then matrices (in, out), each for the output of the one before."
    )


def _follows(before: Layer, layer: Layer) -> bool:
    """Whether a layer takes the output of the one before it, as it is or flattened."""
    shape = before.output_shape
    return layer.input_shape in (shape, (math.prod(shape),))


def _times_inputs(
    layer: Layer, kernel: Float[Array, "*kernel"], factors: Float[Array, " channels"]
) -> Float[Array, "*kernel"]:
    """The kernel for inputs multiplied by a factor for each unit, or channel of a pixel."""
    if isinstance(layer, Dense):
        return kernel * jnp.tile(factors, len(kernel) // len(factors))[:, None]
    *_, inputs, outputs = kernel.shape
    of_groups = factors.reshape(layer.groups, inputs).T
    of_pairs = jnp.repeat(of_groups, outputs // layer.groups, axis=1)
    return kernel * jnp.expand_dims(of_pairs, tuple(range(kernel.ndim - 2)))


def _along_last(
    values: Float[Array, " n"], like: Inexact[Array, "*shape n"]
) -> Float[Array, "..."]:
    """Reshape values for the last axis of an array so that they broadcast with it."""
    return jnp.expand_dims(values, tuple(range(like.ndim - 1)))
