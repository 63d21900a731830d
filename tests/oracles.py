"""Independent answers to compare with."""

import clarabel
import numpy as np
from scipy import sparse


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
