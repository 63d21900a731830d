"""Bounded minimisers as pure steps, and the loop that runs one."""

from advjax.solvers.base import (
    Solver,
    SolverResult,
    SolverState,
    Status,
    initial_state,
    next_state,
    projected_gradient_norm,
    reevaluate,
)
from advjax.solvers.jaxopt import jaxopt_lbfgsb
from advjax.solvers.lbfgsb import lbfgsb
from advjax.solvers.minimize import minimize, minimize_many

__all__ = [
    "Solver",
    "SolverResult",
    "SolverState",
    "Status",
    "initial_state",
    "jaxopt_lbfgsb",
    "lbfgsb",
    "minimize",
    "minimize_many",
    "next_state",
    "projected_gradient_norm",
    "reevaluate",
]
