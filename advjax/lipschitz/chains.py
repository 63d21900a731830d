"""Bounds of a chain of dense layers, tighter than the product of their norms.

The slopes of an elementwise activation tie its input y to its output z unit by unit. Let v be a
difference of two inputs of the chain and suppose that behind some layer the differences are `S w`
with |w| <= |v| for a known matrix S, the identity at first. Let B = W^T S for the next layer's
kernel W, times the largest slopes, so that y = B w, and what is left of the slopes is in [0, 1].
They mean z^T D^2 (y - z) >= 0 for every diagonal D > 0, and with A = D B / 2

    |D z|^2 <= (D z)^T (D B) w <= |w|^2 + |A^T D z|^2,   so   z^T D P D z <= |w|^2,   P = I - A A^T.

Hence, for any T with T^T P T >= (1 - e) I, the differences behind the layer are `D^-1 T w` with
sqrt(1 - e) |w| <= |v|, and the chain's are `W^T D^-1 T w` for its last kernel W. Where T is the
inverse of the transposed Cholesky factor of P, e is 0 but for rounding.

This holds for every D, whatever it comes from: nothing that finds it has to be trusted. What has to
be rounded with care is only the product A A^T, the product T^T P T and the last one. Each is off by
no more than `gram.rounding` says, and e is what T^T P T is seen to differ from I by, and that.

Source: Fazlyab et al. (2019) for the condition, LipSDP; Xu and Sivaranjani (2024) for solving it
layer by layer, ECLipsE.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from advjax import checks
from advjax.lipschitz import gram
from advjax.lipschitz.estimates import power_of_two
from advjax.lipschitz.gram import gamma, magnitude_bound, norm_bound, rounding

Kernels = Sequence[Float[ArrayLike, "in out"]]
Slopes = Sequence[Float[ArrayLike, "*units"]]


class ChainBound(NamedTuple):
    """Lipschitz bounds, in L2, of what a chain of dense layers puts out.

    Attributes:
        constant: Of all outputs together.
        outputs: Of each output.
        pairs: Of the difference of each two outputs.
    """

    constant: Float[Array, ""]
    outputs: Float[Array, " units"]
    pairs: Float[Array, "units units"]


Method = Callable[[Kernels, Slopes], ChainBound]
"""How a chain is bounded: `product`, `eclipse`, `lipsdp`, or a function like them."""


def product(kernels: Kernels, slopes: Slopes) -> ChainBound:
    """Bound a chain of dense layers by the product of their norms.

    Args:
        kernels: The matrix of each layer, `y = z @ kernel`.
        slopes: For the activation after each layer but the last the largest slope; a scalar, or
            one for each unit. No slope may be negative: a ReLU's is 1, a sigmoid's 1/4.

    Returns:
        A `ChainBound`, certified: rounding is accounted for. It is infinite if a kernel is not
        finite.

    Raises:
        TypeError: If a kernel is not floating.
        ValueError: If the kernels do not fit together, or there is not one slope between each two.

    Source: Szegedy et al. (2013), section 4.3.
    """
    return _product(_chain(kernels, slopes))


def eclipse(kernels: Kernels, slopes: Slopes) -> ChainBound:
    """Bound a chain of dense layers with one multiplier a layer, in closed form.

    Args:
        kernels: As for `product`.
        slopes: As for `product`.

    Returns:
        A `ChainBound`, certified, and no larger than that of `product`.

    Raises:
        TypeError: As for `product`.
        ValueError: As for `product`.

    Source: Xu and Sivaranjani (2024), ECLipsE-Fast.
    """
    chain = _chain(kernels, slopes)
    return _smaller(_product(chain), _certified(chain, _start(chain)))


def lipsdp(
    kernels: Kernels, slopes: Slopes, *, num_steps: int = 100, learning_rate: float = 0.3
) -> ChainBound:
    """Bound a chain of dense layers with one multiplier a unit, found by gradient descent.

    The semidefinite program of LipSDP without its solver: eliminated layer by layer, every choice
    of its multipliers is feasible, and each step of Adam ends in a valid bound.

    Args:
        kernels: As for `product`.
        slopes: As for `product`.
        num_steps: How many steps of Adam to take. A hundred come within about 0.2 % of what a
            thousand reach.
        learning_rate: That of Adam at first; it falls to 0 along a cosine.

    Returns:
        A `ChainBound`, certified, and no larger than that of `eclipse`. The multipliers are those
        that were found for the constant of all outputs; those of outputs and of pairs hold for them
        too.

    Raises:
        TypeError: As for `product`.
        ValueError: As for `product`, or if `num_steps` is not a positive integer or `learning_rate`
            not positive.

    Source: Fazlyab et al. (2019), LipSDP-Neuron.
    """
    num_steps = checks.positive_int("num_steps", num_steps)
    rate = checks.number("learning_rate", learning_rate, minimum=0, exclusive=True)
    chain = _chain(kernels, slopes)
    if len(chain) == 1:
        return _product(chain)
    best = jax.lax.stop_gradient(_descend(chain, num_steps, rate))
    return _smaller(*(_certified(chain, m) for m in (_start(chain), best)), _product(chain))


# The bounds, compiled once for the shapes of a chain


@jax.jit
def _product(kernels: list[Array]) -> ChainBound:
    *hidden, last = kernels
    factors = [norm_bound(kernel) + _scaling_error(kernel) for kernel in hidden]
    growth = math.prod(factors, start=jnp.ones((), last.dtype))
    growth *= 1 + gamma(4 * len(kernels), last.dtype)
    scale = power_of_two(last)
    return _bounds(_Reach(last / scale, jnp.zeros((), last.dtype), scale, growth))


@jax.jit
def _certified(kernels: list[Array], multipliers: list["_Multipliers"]) -> ChainBound:
    return _bounds(_reach(kernels, multipliers))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _descend(kernels: list[Array], num_steps: int, learning_rate: float) -> list["_Multipliers"]:
    """The multipliers of the lowest constant on the way of Adam, which need not be trusted."""
    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, num_steps))
    # Only the first kernel's Gram matrix matters, which its triangular factor has too.
    kernels = [jnp.linalg.qr(kernels[0], mode="r"), *kernels[1:]]

    @jax.value_and_grad
    def log_constant(multipliers):
        reach = _reach(kernels, multipliers)
        return jnp.log(_top(reach.matrix)) / 2 + jnp.log(reach.scale)

    def step(carry, _):
        multipliers, state, best, lowest = carry
        value, grad = log_constant(multipliers)
        best = jax.tree.map(lambda a, b: jnp.where(value < lowest, a, b), multipliers, best)
        updates, state = optimizer.update(grad, state)
        following = optax.apply_updates(multipliers, updates)
        return (following, state, best, jnp.fmin(value, lowest)), None

    start = _start(kernels)
    infinite = jnp.full((), jnp.inf, kernels[0].dtype)
    carry = start, optimizer.init(start), start, infinite
    return jax.lax.scan(step, carry, length=num_steps)[0][2]


def _smaller(*bounds: ChainBound) -> ChainBound:
    return jax.tree.map(lambda *values: functools.reduce(jnp.minimum, values), *bounds)


class _Multipliers(NamedTuple):
    """The diagonal D of an activation, up to a factor: `exp(units)`, and how large it is."""

    units: Float[Array, " units"]
    share: Float[Array, ""]


class _Reach(NamedTuple):
    """Differences `scale growth (matrix + E)^T w`: |w| is at most the input's, |E| the error."""

    matrix: Float[Array, "dims units"]
    error: Float[Array, ""]
    scale: Float[Array, ""]
    growth: Float[Array, ""]


def _start(kernels: list[Array]) -> list[_Multipliers]:
    zero = jnp.zeros((), kernels[0].dtype)
    return [_Multipliers(jnp.zeros_like(kernel[0]), zero) for kernel in kernels[:-1]]


def _reach(kernels: list[Array], multipliers: list[_Multipliers]) -> _Reach:
    """The differences that the last layer can put out."""
    one = jnp.ones((), kernels[0].dtype)
    reach = _scaled(_Reach(kernels[0], _scaling_error(kernels[0]), one, one))
    for kernel, multiplier in zip(kernels[1:], multipliers, strict=True):
        reach = _follow(reach, multiplier, kernel)
    return reach


def _scaled(reach: _Reach) -> _Reach:
    """The same with entries of order 1."""
    power = jax.lax.stop_gradient(power_of_two(reach.matrix))
    return _Reach(reach.matrix / power, reach.error / power, reach.scale * power, reach.growth)


def _follow(reach: _Reach, multipliers: _Multipliers, kernel: Float[Array, "in out"]) -> _Reach:
    """Through an activation and the dense layer after it.

    Every elementwise operation is off by less than eps, relatively, and so in norm by less than
    that of the magnitudes.
    """
    eps = float(jnp.finfo(kernel.dtype).eps)
    units = jnp.exp(multipliers.units)
    top = _top(reach.matrix * units[None])
    size = jnp.sqrt(jax.nn.sigmoid(multipliers.share) / jnp.where(top > 0, top, 1))
    half = size * units  # D / 2, exactly
    A = reach.matrix * half[None]
    A_error = jnp.max(half) * reach.error + eps * magnitude_bound(A)
    eye = jnp.eye(len(half), dtype=half.dtype)
    P = eye - gram.product(A, A)
    P_error = rounding(A, A) + A_error * (2 * norm_bound(A) + A_error) + eps
    factor = jnp.linalg.cholesky(P)
    T = jax.scipy.linalg.solve_triangular(factor, eye, lower=True).T
    T_norm = norm_bound(T)
    PT = gram.product(P, T)
    excess = eye - gram.product(T, PT)
    excess_error = rounding(T, PT) + T_norm * (rounding(P, T) + P_error * T_norm) + eps
    e = (magnitude_bound(excess) + excess_error) * (1 + 16 * eps)
    growth = reach.growth * (1 + 8 * eps) / jnp.sqrt(1 - e)

    scale = jax.lax.stop_gradient(power_of_two(kernel))
    weighted = kernel / scale / (2 * half)[:, None]
    error = rounding(T, weighted) + 4 * eps * magnitude_bound(weighted) * T_norm
    return _scaled(_Reach(gram.product(T, weighted), error, reach.scale * scale, growth))


def _scaling_error(kernel: Float[Array, "in out"]) -> Float[Array, ""]:
    """By how much rounding the products with the slopes may have changed a kernel."""
    scale = power_of_two(kernel)
    return scale * magnitude_bound(kernel / scale) * 2 * float(jnp.finfo(kernel.dtype).eps)


def _top(matrix: Float[Array, "rows cols"]) -> Float[Array, ""]:
    """The square of the norm, as it is computed."""
    if len(matrix) < matrix.shape[1]:
        matrix = matrix.T
    return jnp.linalg.eigvalsh(gram.product(matrix, matrix))[-1]


def _bounds(reach: _Reach) -> ChainBound:
    eps = float(jnp.finfo(reach.matrix.dtype).eps)
    dims, rows = len(reach.matrix), reach.matrix.T
    rounded_up = 1 + gamma(dims + 16, rows.dtype)
    factor = reach.scale * reach.growth * rounded_up

    def lengths(vectors):
        return jnp.sqrt(jnp.sum(vectors**2, axis=1))

    # A difference of two rows is off by E times (1, -1), and by its own rounding.
    pairs = jax.lax.map(lambda row: lengths(row[None] - rows), rows)
    found = ChainBound(
        constant=factor * (norm_bound(rows) + reach.error),
        outputs=factor * (lengths(rows) + reach.error),
        pairs=factor * (pairs + math.sqrt(2) * (1 + eps) * reach.error),
    )
    return jax.tree.map(lambda x: jnp.where(jnp.isfinite(x), x, jnp.inf), found)


def _chain(kernels: Kernels, slopes: Slopes) -> list[Array]:
    """The kernels, times the slopes between them."""
    matrices = [checks.floating("kernels", kernel) for kernel in kernels]
    shapes = [matrix.shape for matrix in matrices]
    fits = all(len(shape) == 2 for shape in shapes) and all(
        one[1] == other[0] for one, other in itertools.pairwise(shapes)
    )
    if not matrices or not fits:
        raise ValueError(f"kernels: shapes {shapes}, expected (in, out), one's out the next's in.")
    if len(slopes) != len(matrices) - 1:
        raise ValueError(
            f"slopes: {len(slopes)} for {len(matrices)} kernels, expected one between each two."
        )
    dtype = jnp.promote_types(jnp.result_type(*matrices), jnp.float32)
    # Half of each on either side, so that a unit of slope 0 is out of the chain altogether.
    rounded_up = 1 + 2 * float(jnp.finfo(dtype).eps)
    halves = [
        jnp.sqrt(jnp.broadcast_to(jnp.asarray(slope, dtype), shape[1:])) * rounded_up
        for slope, shape in zip(slopes, shapes[:-1], strict=True)
    ]
    before = [jnp.ones(shapes[0][0], dtype), *halves]
    behind = [*halves, jnp.ones(shapes[-1][1], dtype)]
    return [
        matrix.astype(dtype) * rows[:, None] * columns[None]
        for matrix, rows, columns in zip(matrices, before, behind, strict=True)
    ]
