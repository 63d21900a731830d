"""LOWER estimates of the norms of linear functions, from products with A and its transpose."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from advjax import checks, losses
from advjax.lipschitz.linear.rounding import power_of_two

LinearFn = Callable[[Float[Array, "*shape"]], Float[Array, "*out"]]


class Estimate(NamedTuple):
    """A lower estimate of an operator norm.

    Attributes:
        value: `|A v|` for the best unit vector v that was found. The norm is at least this, up to
            rounding. It may be larger by any amount, whatever the number of steps.
        residual: `|A^T A v - value^2 v| / value^2`. A small residual shows that `value` is near *a*
            singular value, not that it is near the largest.
        num_steps: Number of products with A, and as many with its transpose, for each start.
    """

    value: Float[Array, ""]
    residual: Float[Array, ""]
    num_steps: Int[Array, ""]


class LanczosEstimate(NamedTuple):
    """An estimate of an operator norm from both sides.

    Attributes:
        value: As in `Estimate`.
        upper: For any operator, the norm exceeds this with at most `failure_probability` over the
            random starts; infinite where there are too few steps for such a statement.
        residual: As in `Estimate`.
        num_steps: As in `Estimate`.
    """

    value: Float[Array, ""]
    upper: Float[Array, ""]
    residual: Float[Array, ""]
    num_steps: Int[Array, ""]


class Pair(NamedTuple):
    """An approximate singular value with its unit vectors: `A right = value left`."""

    value: Float[Array, ""]
    left: Float[Array, "*out"]
    right: Float[Array, "*shape"]
    residual: Float[Array, ""]


def power_iteration(
    linear_fn: LinearFn,
    like: Float[Array, "*shape"] | jax.ShapeDtypeStruct,
    *,
    key: PRNGKeyArray,
    num_starts: int = 2,
    num_steps: int = 100,
    tol: float = 1e-4,
) -> Estimate:
    """Estimate the norm of a linear function from below, by power iteration.

    It works on the function itself and its exact transpose, so that strides, padding, dilation and
    groups of a convolution are right by construction.

    Args:
        linear_fn: A linear function of one array, such as a layer without its bias.
        like: An array of the shape and dtype of its argument, or a `jax.ShapeDtypeStruct`.
        key: The random key of the starts.
        num_starts: How many random starts to iterate side by side; the best one counts.
        num_steps: The most steps to take.
        tol: Stop when the residual of every start is at most this.

    Returns:
        An `Estimate`, from BELOW: `lanczos` comes nearer for the same number of products, and
        `dense_norm` and `conv_norm` bound the norm from above.

    Raises:
        TypeError: If `like` is not floating.
        ValueError: If `num_starts` or `num_steps` is not a positive integer, or `tol` is negative.

    Reference: Szegedy et al. (2013), section 4.3, asks for operator norms; Golub and Van Loan
    (2013), section 8.2, for the method.
    """
    num_starts = checks.positive_int("num_starts", num_starts)
    num_steps = checks.positive_int("num_steps", num_steps)
    tol = checks.number("tol", tol, minimum=0)
    like, _, transpose = _both_sides(linear_fn, like)
    operator, starts = _started(linear_fn, transpose, like, key, num_starts)

    def unfinished(carry: tuple) -> Bool[Array, ""]:
        _, best, step = carry
        return (step == 0) | ((step < num_steps) & jnp.any(best.residual > tol))

    def step(carry: tuple) -> tuple:
        vectors, _, count = carry
        pairs, images = jax.vmap(operator.rayleigh)(vectors)
        return jax.vmap(unit)(images), pairs, count + 1

    nothing = jax.eval_shape(jax.vmap(operator.rayleigh), starts)[0]
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), nothing)
    _, pairs, count = jax.lax.while_loop(unfinished, step, (starts, zeros, jnp.int32(0)))
    best = _best(pairs)
    return Estimate(best.value, best.residual, count)


def power_step(
    linear_fn: LinearFn, vector: Float[Array, "*shape"], *, num_steps: int = 1
) -> Float[Array, "*shape"]:
    """Take steps of power iteration: turn a vector towards the top right singular vector.

    Args:
        linear_fn: A linear function of one array, such as a layer without its bias.
        vector: The vector to start from, not 0: most often the result of the last call.
        num_steps: Number of steps to take.

    Returns:
        A vector of length 1; or 0 if the function maps the vector to 0.
    """
    transpose = jax.linear_transpose(linear_fn, vector)

    def step(_: Int[Array, ""], vector: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        (image,) = transpose(unit(linear_fn(vector)))
        return unit(image)

    return jax.lax.fori_loop(0, num_steps, step, unit(vector), unroll=num_steps <= 2)


def lanczos(
    linear_fn: LinearFn,
    like: Float[Array, "*shape"] | jax.ShapeDtypeStruct,
    *,
    key: PRNGKeyArray,
    num_starts: int = 2,
    num_steps: int = 30,
    failure_probability: float = 1e-6,
) -> LanczosEstimate:
    """Estimate the norm of a linear function by the Lanczos method, with a probable upper bound.

    It works on the smaller of `A^T A` and `A A^T` with full reorthogonalisation, and keeps
    `num_starts * num_steps` vectors of that size in memory.

    Args:
        linear_fn: A linear function of one array, such as a layer without its bias.
        like: An array of the shape and dtype of its argument, or a `jax.ShapeDtypeStruct`.
        key: The random key of the starts.
        num_starts: How many random starts to run side by side; the best one counts.
        num_steps: Steps of each start, a product with A and one with its transpose each. No more
            are taken than there are dimensions.
        failure_probability: The probability, over the random starts, that `upper` is too small.

    Returns:
        A `LanczosEstimate`. `upper` is derived for exact arithmetic; with the default of 30 steps
        it is some per cent above `value`, far more than rounding.

    Raises:
        TypeError: If `like` is not floating.
        ValueError: If `num_starts` or `num_steps` is not a positive integer, or
            `failure_probability` is not in (0, 1).

    Reference: Kuczynski and Wozniakowski (1992), theorem 4.1(b): after k steps in n dimensions the
    largest Ritz value is off by more than a relative error e of the largest eigenvalue with
    probability at most `1.648 sqrt(n) exp(-sqrt(e) (2 k - 1))`.
    """
    num_starts = checks.positive_int("num_starts", num_starts)
    num_steps = checks.positive_int("num_steps", num_steps)
    delta = checks.fraction("failure_probability", failure_probability)

    pair, size = _lanczos(linear_fn, like, key, num_starts, num_steps)
    # With as many steps as dimensions the method is exact: further steps need not be taken for the
    # theorem to hold for them. Solved for e, with the starts independent: root = sqrt(e).
    root = (math.log(1.648 * math.sqrt(size)) - math.log(delta) / num_starts) / (2 * num_steps - 1)
    factor = 1 / math.sqrt(1 - root**2) if root < 1 else math.inf
    upper = jnp.where(pair.value > 0, pair.value * factor, 0)
    count = jnp.int32(min(num_steps, size))
    return LanczosEstimate(pair.value, upper, pair.residual, count)


def top_pair(
    linear_fn: LinearFn, like: Float[Array, "*shape"] | jax.ShapeDtypeStruct, *, num_steps: int = 30
) -> Pair:
    """Find the largest singular value with its vectors by Lanczos, from a fixed start."""
    return _lanczos(linear_fn, like, jax.random.key(0), 1, num_steps)[0]


class _Operator(NamedTuple):
    """A linear function and its transpose, divided by a power of two to make the norm of order 1.

    Without the scale, the square of a norm of 1e-24 would underflow to 0 in float32.
    """

    forward: LinearFn
    transpose: LinearFn
    scale: Float[Array, ""]

    def rayleigh(self, right: Float[Array, "*shape"]) -> tuple[Pair, Float[Array, "*shape"]]:
        """The singular pair that a unit vector approximates, and `A^T A` times the vector."""
        left = self.forward(right)
        value = losses.l2(left)
        image = self.transpose(left)
        positive = jnp.where(value > 0, value, 1)
        residual = losses.l2(image / positive**2 - jnp.where(value > 0, right, 0))
        return Pair(value * self.scale, left / positive, right, residual), image


def _both_sides(
    linear_fn: LinearFn, like: Any
) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct, LinearFn]:
    """The input's and output's shapes, and the transpose; an error unless floating and linear."""
    like = jax.ShapeDtypeStruct(like.shape, like.dtype)
    if not jnp.issubdtype(like.dtype, jnp.floating):
        raise TypeError(f"like: dtype {like.dtype}, expected a floating one such as float32.")
    transpose = jax.linear_transpose(linear_fn, like)
    return like, jax.eval_shape(linear_fn, like), lambda y: transpose(y)[0]


def _started(
    forward: LinearFn, transpose: LinearFn, like: jax.ShapeDtypeStruct, key: PRNGKeyArray, num: int
) -> tuple[_Operator, Float[Array, "starts *shape"]]:
    """The scaled operator, and random unit vectors."""
    normal = jax.random.normal(key, (num, *like.shape), like.dtype)
    starts = jax.vmap(unit)(normal)
    scale = power_of_two(forward(starts[0]))

    def scaled(x: Array) -> Array:
        # Without the barrier XLA may merge two divisions by the scale into one by its square,
        # which underflows or overflows.
        return jax.lax.optimization_barrier(x / scale)

    return _Operator(lambda x: scaled(forward(x)), lambda y: transpose(scaled(y)), scale), starts


def _lanczos(
    linear_fn: LinearFn, like: Any, key: PRNGKeyArray, num_starts: int, num_steps: int
) -> tuple[Pair, int]:
    """The best top pair of all starts, and the number of dimensions it was searched in."""
    like, out, transpose = _both_sides(linear_fn, like)
    sides, turned = (linear_fn, transpose, like), out.size < like.size
    if turned:  # the Krylov space of the smaller side takes less memory
        sides = (transpose, linear_fn, out)
    operator, starts = _started(*sides, key, num_starts)
    steps = max(min(num_steps, sides[2].size), 1)
    pair = _best(jax.vmap(lambda start: _krylov(operator, start, steps))(starts))
    if turned:
        pair = pair._replace(left=pair.right, right=pair.left)
    return pair, sides[2].size


def _krylov(operator: _Operator, start: Float[Array, "*shape"], num_steps: int) -> Pair:
    """The top Ritz pair of `A^T A` on the Krylov space of a start."""
    shape = start.shape
    rounding = math.sqrt(start.size) * jnp.finfo(start.dtype).eps

    def step(basis: Float[Array, "steps n"], index: Int[Array, ""]) -> tuple[Array, tuple]:
        vector = basis[index]
        image = jnp.ravel(operator.transpose(operator.forward(vector.reshape(shape))))
        diagonal, length = _dot(vector, image), losses.l2(image)
        for _ in range(2):  # twice is enough (Parlett, 1998, section 6.9)
            image = image - _dot(_dot(basis, image), basis)
        beta = losses.l2(image)
        # Once the Krylov space is exhausted, the rest is rounding and is dropped. The zeros that
        # follow only add Ritz values of 0.
        beta = jnp.where(beta > rounding * length, beta, 0)
        following = jnp.where(beta > 0, image / jnp.where(beta > 0, beta, 1), 0)
        basis = basis.at[index + 1].set(following, mode="drop")
        return basis, (diagonal, beta)

    basis = jnp.zeros((num_steps, start.size), start.dtype).at[0].set(jnp.ravel(start))
    basis, (diagonal, beta) = jax.lax.scan(step, basis, jnp.arange(num_steps))
    off = jnp.diag(beta[:-1], 1)
    _, vectors = jnp.linalg.eigh(jnp.diag(diagonal) + off + off.T)
    return operator.rayleigh(unit(_dot(vectors[:, -1], basis).reshape(shape)))[0]


def _best(pairs: Pair) -> Pair:
    index = jnp.argmax(pairs.value)
    return jax.tree.map(lambda leaf: leaf[index], pairs)


def _dot(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def unit(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Scale an array to length 1; 0 stays 0."""
    x = x / jax.lax.stop_gradient(power_of_two(x))  # so that no square underflows or overflows
    norm = losses.l2(x)
    return x / jnp.where(norm > 0, norm, 1)
