"""Our minimiser against SciPy and the JAX libraries (figure; an hour; no data).

Every minimiser takes the same textbook problems, with bounds and without, in float64 from the same
starts. A problem counts as solved at the first evaluation at or below `f* + 1e-6 (f0 - f*)`, where
f* is the least value that any of them found: how a minimiser stops plays no part. Evaluations are
those of the objective; SciPy, ours and jaxopt take a gradient with each, the others with some.

Ours are `solvers.lbfgsb` with a memory of 4 and of 10, SciPy's L-BFGS-B and the peers have 10.
jaxopt's L-BFGS-B is guarded as in `solvers.jaxopt_lbfgsb`. optimistix and optax know no bounds and
take the problems that have none. Convex quadratic programs in a box, of condition 1e4 and 1e6, are
counted apart, as are the same problems times 1e-12 and 1e12.

Expected: ours solve as many problems as SciPy in as many evaluations (geometric mean).
"""

import functools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from advjax import Box, solvers
from experiments import results
from experiments.solver_problems import Problem, box_qp, suite

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ACCURACY = 1e-6  # of f0 - f*
UNSOLVED = -1  # evaluations, where it never came there
COLOURS = {
    "advjax, memory 4": "tab:orange",
    "advjax, memory 10": "tab:red",
    "SciPy": "black",
    "jaxopt": "tab:purple",
    "optimistix": "tab:blue",
    "optax": "tab:green",
}
Trace = list[float]  # the objective at each evaluation
Way = Callable[[Problem, int], Trace]


def main(
    *,
    budget: int = 3000,
    large_budget: int = 10000,
    programs: int = 200,
    peers: bool = True,
    out: Path = Path("results"),
    quick: bool = False,
) -> None:
    """Counts the evaluations that each minimiser takes for each problem.

    What a minimiser did on the suite is kept in `out` and taken again by the next run.

    Args:
        budget: The most evaluations of one problem.
        large_budget: The most of a problem of 1,000 variables or more.
        programs: How many quadratic programs of each condition.
        peers: Whether to run the JAX libraries too.
        out: The folder for the numbers and the figure.
        quick: A few problems and no peers: a minute, for a trial.
    """
    with jax.enable_x64(True):
        problems = suite(large=not quick)
        if quick:
            problems, programs, peers = dict(list(problems.items())[::8]), 5, False
        ways = WAYS if peers else {name: WAYS[name] for name in OURS_AND_SCIPY}
        budgets = {
            name: large_budget if len(problem.x0) >= 1000 else budget
            for name, problem in problems.items()
        }
        content = {
            "experiment": "solvers",
            "accuracy": ACCURACY,
            "problems": compare(problems, ways, budgets, out / "solvers-traces"),
            "quadratic_programs": [
                quadratic_programs(programs, condition) for condition in (1e4, 1e6)
            ],
            "scales": scales(problems, budget),
        }
    out.mkdir(parents=True, exist_ok=True)
    content = results.save_json(out / "solvers.json", content)
    print(f"\n{describe(content)}\n")
    draw(content).savefig(out / "solvers.png")
    print(
        results.saved(
            {out / "solvers.json": "the numbers above", out / "solvers.png": "performance profiles"}
        )
    )


# --- the minimisers --------------------------------------------------------------------------


def ours(problem: Problem, budget: int, *, memory: int = 10, scale: float = 1.0) -> Trace:
    """Our solver, stepped from outside: compiled once for each number of variables."""
    return _stepped(problem, budget, memory, scale)[0]


def _stepped(problem: Problem, budget: int, memory: int, scale: float = 1.0) -> tuple[Trace, int]:
    init, before, after = _halves(memory, len(problem.x0))
    box = _box(problem)
    value_and_grad = jax.jit(jax.value_and_grad(lambda x: scale * problem.fun(x)))
    state = init(jnp.asarray(problem.x0, float), box)
    trace: Trace = []
    while len(trace) < budget and state.status == solvers.Status.RUNNING:
        value, grad = value_and_grad(before(state, box))
        state = after(state, value, grad, box)
        trace.append(float(value) / scale)
    return trace, int(state.status)


@functools.cache
def _halves(memory: int, size: int) -> tuple[Callable, Callable, Callable]:
    """Of a step: state to trial point, and trial point's value and gradient to the next state."""
    solver = solvers.lbfgsb(memory=memory)

    def init(x0, box):
        return solver.init(lambda x: ((jnp.sum(x), ()), x), x0, box)

    def before(state, box):
        trials = []

        def record(x):
            trials.append(x)
            return (jnp.zeros((), x.dtype), ()), x

        solver.step(record, state, box)
        return trials[0]

    def after(state, value, grad, box):
        return solver.step(lambda x: ((value, ()), grad), state, box)

    return jax.jit(init), jax.jit(before), jax.jit(after)


def _box(problem: Problem) -> Box:
    return Box(
        *(
            jnp.broadcast_to(jnp.asarray(bound, float), problem.x0.shape)
            for bound in (problem.lower, problem.upper)
        )
    )


def scipy(problem: Problem, budget: int) -> Trace:
    """SciPy's L-BFGS-B, run until rounding stops it."""
    from scipy import optimize

    value_and_grad = jax.jit(jax.value_and_grad(problem.fun))
    trace: Trace = []

    def fun(x):
        value, grad = value_and_grad(x)
        trace.append(float(value))
        return float(value), np.asarray(grad)

    lower, upper = map(np.asarray, _box(problem))
    optimize.minimize(
        fun,
        np.clip(problem.x0, lower, upper),
        jac=True,
        method="L-BFGS-B",
        bounds=optimize.Bounds(lower, upper),
        options={"maxcor": 10, "ftol": 1e-16, "gtol": 1e-12, "maxfun": budget, "maxiter": budget},
    )
    return trace


def _recorded(problem: Problem) -> tuple[Callable, Trace]:
    """The objective as a function that tells each value it takes, from inside a program too."""
    trace: Trace = []

    def fun(x, *_):
        value = problem.fun(x)
        jax.debug.callback(lambda value: trace.append(float(value)), value, ordered=True)
        return value

    return fun, trace


def jaxopt(problem: Problem, budget: int) -> Trace:
    """Jaxopt's L-BFGS-B, guarded."""
    fun, trace = _recorded(problem)
    solvers.minimize(
        fun,
        jnp.asarray(problem.x0, float),
        box=_box(problem),
        solver=solvers.jaxopt_lbfgsb(),
        tol=1e-12,
        ftol=0,
        max_evals=budget,
    )
    jax.effects_barrier()
    return trace


def optimistix(problem: Problem, budget: int) -> Trace:
    """Optimistix's L-BFGS."""
    import optimistix

    fun, trace = _recorded(problem)
    optimistix.minimise(
        fun,
        optimistix.LBFGS(rtol=1e-12, atol=1e-12, history_length=10),
        jnp.asarray(problem.x0, float),
        max_steps=budget,
        throw=False,
    )
    jax.effects_barrier()
    return trace


def optax(problem: Problem, budget: int) -> Trace:
    """Optax's L-BFGS with its zoom line search, as its documentation runs it."""
    import optax

    fun, trace = _recorded(problem)
    optimizer = optax.lbfgs(memory_size=10)
    value_and_grad = optax.value_and_grad_from_state(fun)

    def step(carry):
        x, state, count = carry
        value, grad = value_and_grad(x, state=state)
        updates, state = optimizer.update(grad, state, x, value=value, grad=grad, value_fn=fun)
        return optax.apply_updates(x, updates), state, count + 1

    def running(carry):
        _, state, count = carry
        grad = optax.tree.get(state, "grad")
        return (count == 0) | ((count < budget) & (optax.tree.norm(grad) > 1e-12))

    @jax.jit
    def run(x0):
        return jax.lax.while_loop(running, step, (x0, optimizer.init(x0), 0))

    jax.block_until_ready(run(jnp.asarray(problem.x0, float)))
    jax.effects_barrier()
    return trace[:budget]


WAYS: dict[str, Way] = {
    "advjax, memory 4": functools.partial(ours, memory=4),
    "advjax, memory 10": ours,
    "SciPy": scipy,
    "jaxopt": jaxopt,
    "optimistix": optimistix,
    "optax": optax,
}
OURS_AND_SCIPY = ("advjax, memory 4", "advjax, memory 10", "SciPy")
WITHOUT_BOUNDS = ("optimistix", "optax")
SMALL_ONLY = ("jaxopt", "optimistix", "optax")  # on more variables they take hours here


# --- the measurements ------------------------------------------------------------------------


def compare(
    problems: Mapping[str, Problem], ways: Mapping[str, Way], budgets: Mapping[str, int], kept: Path
) -> list[results.Row]:
    """The evaluations that each minimiser takes for each problem."""
    traces: dict[str, dict[str, Trace]] = {name: {} for name in problems}
    for way, run in ways.items():
        for name, problem in problems.items():
            if (problem.bounded and way in WITHOUT_BOUNDS) or (
                len(problem.x0) >= 1000 and way in SMALL_ONLY
            ):
                continue
            path = kept / f"{way}, {name}, {budgets[name]}.json"
            if path.exists():
                traces[name][way] = json.loads(path.read_text(encoding="utf-8"))
                continue
            trace = np.minimum.accumulate(np.nan_to_num(run(problem, budgets[name]), nan=np.inf))
            traces[name][way] = trace.tolist()
            kept.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(traces[name][way]), encoding="utf-8")
    rows = []
    for name, problem in problems.items():
        least = min(min(trace) for trace in traces[name].values())
        first = traces[name]["SciPy"][0]
        rows.append(
            {
                "problem": name,
                "variables": len(problem.x0),
                "bounded": problem.bounded,
                "least": least,
                "evaluations": {
                    way: reached(trace, first, least) for way, trace in traces[name].items()
                },
            }
        )
    return rows


def reached(trace: Sequence[float], first: float, least: float) -> int:
    """How many evaluations it took to come near the least value."""
    near = np.flatnonzero(np.asarray(trace) <= least + ACCURACY * (first - least))
    return int(near[0]) + 1 if len(near) else UNSOLVED


def quadratic_programs(count: int, condition: float) -> results.Row:
    """Evaluations of our solver (memory 10) and SciPy's on random box QPs of 20 variables."""
    budget = 2000
    taken: dict[str, list[int]] = {"advjax": [], "SciPy": []}
    ends = []
    for seed in range(count):
        problem = box_qp(seed, condition=condition)
        mine, status = _stepped(problem, budget, memory=10)
        theirs = scipy(problem, budget)
        least = min(*mine, *theirs)
        taken["advjax"].append(reached(mine, mine[0], least))
        taken["SciPy"].append(reached(theirs, mine[0], least))
        ends.append(status)
    return {
        "condition": condition,
        "count": count,
        "unsolved": {way: sum(n == UNSOLVED for n in ns) for way, ns in taken.items()},
        "mean": {way: float(np.mean(ns)) for way, ns in taken.items()},
        "most": {way: max(ns) for way, ns in taken.items()},
        "at_the_budget": sum(status == solvers.Status.RUNNING for status in ends),
    }


def scales(problems: Mapping[str, Problem], budget: int) -> results.Row:
    """Whether the first evaluations stay the same when the objective is scaled."""
    same = status_same = total = 0
    for problem in problems.values():
        if len(problem.x0) >= 1000:
            continue
        plain, status = _stepped(problem, budget, 10)
        first = np.asarray(plain[:15])
        for scale in (1e-12, 1e12):
            scaled, scaled_status = _stepped(problem, budget, 10, scale)
            other = np.asarray(scaled[: len(first)])
            total += 1
            same += len(other) == len(first) and np.allclose(other, first, rtol=1e-5, atol=1e-300)
            status_same += scaled_status == status
    return {"runs": total, "same_first_15": int(same), "same_status": int(status_same)}


# --- what is shown ---------------------------------------------------------------------------


def describe(content: Mapping[str, Any]) -> str:
    """Tables of the numbers."""
    rows = content["problems"]
    ways = [way for way in COLOURS if any(way in row["evaluations"] for row in rows)]
    lines = []
    for way in ways:
        ratios, worst, solved, count = _against_scipy(rows, way)
        lines.append(
            [way, f"{solved} of {count}", f"{np.exp(np.mean(np.log(ratios))):.2f}", f"{worst:.1f}"]
        )
    header = ["", "solved", "evaluations / SciPy's, geometric mean", "most"]
    programs = [
        [
            f"{row['condition']:.0e}",
            *(f"{row['mean'][way]:.0f}, at most {row['most'][way]}" for way in ("advjax", "SciPy")),
        ]
        for row in content["quadratic_programs"]
    ]
    scale = content["scales"]
    return "\n\n".join(
        [
            results.table(header, lines),
            results.table(["box QPs of condition", "advjax, memory 10", "SciPy"], programs),
            f"Times 1e-12 and 1e12: the same first evaluations in {scale['same_first_15']} of "
            f"{scale['runs']} runs, the same status in {scale['same_status']}.",
        ]
    )


def _against_scipy(rows: Iterable[results.Row], way: str) -> tuple[list[float], float, int, int]:
    """Of the problems that both solved, the ratios of evaluations; how many `way` solved."""
    mine = [row["evaluations"] for row in rows if way in row["evaluations"]]
    ratios = [
        evaluations[way] / evaluations["SciPy"]
        for evaluations in mine
        if UNSOLVED not in (evaluations[way], evaluations["SciPy"])
    ]
    solved = sum(evaluations[way] != UNSOLVED for evaluations in mine)
    return ratios, max(ratios, default=float("nan")), solved, len(mine)


def draw(content: Mapping[str, Any]) -> "Figure":
    """Performance profiles (Dolan and More, 2002), of the problems with and without bounds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, bounded in zip(axes, (True, False), strict=True):
        rows = [row["evaluations"] for row in content["problems"] if row["bounded"] == bounded]
        for way, colour in COLOURS.items():
            solved = [row for row in rows if way in row]
            if not solved:
                continue
            ratios = np.array([_ratio(row, way) for row in solved])
            factors = np.geomspace(1, 16, 200)
            axis.plot(
                factors,
                [np.mean(ratios <= factor) for factor in factors],
                color=colour,
                label=way,
            )
        axis.set(
            xscale="log",
            xlabel="evaluations, in multiples of the best minimiser's",
            title=f"{len(rows)} problems {'with' if bounded else 'without'} bounds",
            xlim=(1, 16),
            ylim=(0, 1.02),
        )
        axis.set_xticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
        axis.minorticks_off()
        axis.legend(fontsize=8, loc="lower right")
    axes[0].set_ylabel("fraction solved")
    return figure


def _ratio(evaluations: Mapping[str, int], way: str) -> float:
    best = min((n for n in evaluations.values() if n != UNSOLVED), default=1)
    return float("inf") if evaluations[way] == UNSOLVED else evaluations[way] / best
