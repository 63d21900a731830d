"""Bounded minimisers, each one pure step, and the loop that runs one."""

from advjax.solvers.base import Solver, SolverResult, SolverState, Status
from advjax.solvers.jaxopt import jaxopt_lbfgsb
from advjax.solvers.lbfgsb import lbfgsb
from advjax.solvers.minimize import minimize

__all__ = [
    "Solver",
    "SolverResult",
    "SolverState",
    "Status",
    "jaxopt_lbfgsb",
    "lbfgsb",
    "minimize",
]
