"""Independent answers to compare with."""

import itertools

import clarabel
import jax
import numpy as np
from scipy import sparse

from advjax.lipschitz.linear.layers import Axis


def nearest_in_half_spaces(x, target, kernel, bias):
    """The exact minimum distortion of a linear classifier in [0, 1]: a quadratic program.

    min ||y - x||^2 subject to (w_j - w_t) y + b_j - b_t <= 0 for every j, and to the box.
    """
    x, kernel, bias = (np.asarray(a, np.float64) for a in (x, kernel, bias))
    n = x.size
    others = np.arange(len(bias)) != target
    rows = (kernel[:, others] - kernel[:, [target]]).T
    constraints = sparse.csc_matrix(np.vstack([rows, np.eye(n), -np.eye(n)]))
    limits = np.concatenate([bias[target] - bias[others], np.ones(n), np.zeros(n)])
    settings = clarabel.DefaultSettings()
    settings.verbose = False
    solution = clarabel.DefaultSolver(
        sparse.eye(n, format="csc"),
        -x.ravel(),
        constraints,
        limits,
        [clarabel.NonnegativeConeT(len(limits))],
        settings,
    ).solve()
    assert str(solution.status) == "Solved"
    return np.asarray(solution.x).reshape(x.shape)


def rms(x, y):
    """The root mean square of a difference, in float64."""
    return np.sqrt(np.mean((np.asarray(x, np.float64) - np.asarray(y, np.float64)) ** 2))


def conv_matrix(kernel, input_shape, strides=1, padding="SAME", dilation=1, groups=1):
    """The matrix (inputs, outputs) of a convolution, from its definition, in float64.

    Of each, where the kernel has a leading axis more.
    """
    rank = len(input_shape) - 1
    *window, inputs, outputs = kernel.shape[-rank - 2 :]
    many = kernel.shape[: -rank - 2]
    strides = (strides,) * rank if isinstance(strides, int) else strides
    dilation = (dilation,) * rank if isinstance(dilation, int) else dilation
    if isinstance(padding, str):
        covered = [(w - 1) * d + 1 for w, d in zip(window, dilation, strict=True)]
        padding = jax.lax.padtype_to_pads(input_shape[:-1], covered, strides, padding)
    axes = [
        Axis(*map(int, (n, w, s, *pads, d)))
        for n, w, s, pads, d in zip(input_shape, window, strides, padding, dilation, strict=False)
    ]
    outs = [axis.out_size for axis in axes]
    matrix = np.zeros((*many, *input_shape, *outs, outputs))
    for position in itertools.product(*map(range, outs)):
        for tap in itertools.product(*map(range, window)):
            at = [
                o * a.stride + t * a.dilation - a.low
                for o, t, a in zip(position, tap, axes, strict=True)
            ]
            if any(not 0 <= i < a.size for i, a in zip(at, axes, strict=True)):
                continue
            for group in range(groups):
                reads = slice(group * inputs, (group + 1) * inputs)
                makes = slice(group * outputs // groups, (group + 1) * outputs // groups)
                matrix[(..., *at, reads, *position, makes)] += kernel[
                    (..., *tap, slice(None), makes)
                ]
    return matrix.reshape(*many, int(np.prod(input_shape)), -1)


def jacobians(matrices, slopes, *, num, ones=0.5, seed=0):
    """The Jacobians (num, outputs, inputs) of a chain, in float64, with slopes drawn at random.

    Most have slopes at their ends, 0 or the largest, the latter for a fraction above `ones`.
    """
    rng = np.random.default_rng(seed)
    total = np.broadcast_to(np.eye(len(matrices[0])), (num, *2 * matrices[0].shape[:1]))
    for matrix, slope in zip(matrices, [*slopes, None], strict=True):
        total = np.asarray(matrix, np.float64).T @ total
        if slope is not None:
            inside = rng.uniform(size=total.shape[:2])
            fractions = np.where(rng.random((num, 1)) < 0.7, inside > ones, inside)
            total = fractions[..., None] * (slope * total)
    return total
