"""Our minimiser against SciPy's and the JAX libraries' (figure; 40 min; no data).

Every minimiser gets the same textbook problems, with bounds and without, in float64 from the same
starts. A problem counts as solved at the first evaluation at or below `f* + 1e-6 (f0 - f*)`, where
f0 is the objective at the start and f* the least value that any of them found. So the stopping
rules do not matter.

Ours is `solvers.lbfgsb` with a memory of 4 and of 10; SciPy's L-BFGS-B has 10. With `--peers`,
hours more, jaxopt's L-BFGS-B, guarded as in `solvers.jaxopt_lbfgsb`, and the L-BFGS of optimistix
and optax, all with 10 as well, on the problems of fewer than 1,000 variables; the last two only on
those without bounds. Convex quadratic programs in a box, of condition 1e4 and 1e6, are counted
separately, and so are the problems with the objective times 1e-12 and 1e12.

Expected: ours solves as many problems as SciPy with as many evaluations (geometric mean).
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from matplotlib.figure import Figure

import advjax
from advjax import data, files, solvers
from experiments.common import markdown, minimisers, options, solver_problems
from experiments.common.measure import Arrays, Content, Row
from experiments.common.minimisers import Minimiser, Trace
from experiments.common.solver_problems import Problem

ACCURACY = 1e-6  # of f0 - f*
UNSOLVED = -1  # evaluations, where a minimiser never reached the least value
LARGE = 1000  # variables
SCALES = (1e-12, 1e12)
CONDITIONS = (1e4, 1e6)
COLOURS = {
    "advjax, memory 4": "tab:orange",
    "advjax, memory 10": "tab:red",
    "SciPy": "black",
    "jaxopt": "tab:purple",
    "optimistix": "tab:blue",
    "optax": "tab:green",
}


class Problems(NamedTuple):
    """The problems by name."""

    by_name: dict[str, Problem]
    splits: tuple[data.Dataset, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(options.Options):
    """Counts the evaluations that each minimiser takes for each problem.

    Each trace is saved under `out` as it is found; a run that was stopped starts from those.
    """

    budget: int = 3000
    """The most evaluations of one problem."""
    large_budget: int = 10_000
    """The most evaluations of a problem of 1,000 variables or more."""
    programs: int = 200
    """How many quadratic programs of each condition."""
    peers: bool = False
    """Run the JAX libraries too."""
    TRIAL = options.trial(budget=1000, programs=3, peers=False)

    @property
    def expected_source(self) -> str:
        """The problems are in the code."""
        return "literature"

    def load(self) -> Problems:
        """Make the problems, once the packages are known to be there; a trial has every ninth."""
        if self.peers:
            minimisers.require_peers()
        problems = solver_problems.suite(large=not self.quick)
        return Problems(dict(list(problems.items())[:: 9 if self.quick else 1]))

    def config(self) -> dict[str, Any]:
        """The options that affect the numbers; there is no data set."""
        return super().config() | {"dataset": "textbook problems"}


def measure(options: Options, problems: Problems, seed: int) -> Row:
    """Compare the minimisers on all problems, on quadratic programs, and on scaled problems."""
    del seed  # nothing is random but the quadratic programs, which have seeds of their own
    found = minimisers.OURS_AND_SCIPY | (minimisers.PEERS if options.peers else {})
    budgets = {
        name: options.large_budget if _is_large(problem) else options.budget
        for name, problem in problems.by_name.items()
    }
    with jax.enable_x64(True):
        return {
            "problems": compare(problems.by_name, found, budgets, trace_folder(options.out)),
            "quadratic_programs": [
                quadratic_programs(options.programs, condition) for condition in CONDITIONS
            ],
            "scales": scales(problems.by_name, options.budget),
        }


def _is_large(problem: Problem) -> bool:
    return len(problem.x0) >= LARGE


# --- the textbook problems -------------------------------------------------------------------


def compare(
    problems: Mapping[str, Problem],
    ways: Mapping[str, Minimiser],
    budgets: Mapping[str, int],
    folder: Path,
) -> list[Row]:
    """Count the evaluations that each minimiser takes for each problem.

    Args:
        problems: The problems by name.
        ways: The minimisers by name, SciPy among them.
        budgets: The most evaluations of each problem.
        folder: Where the traces are saved, and read if they are there.

    Returns:
        A row for each problem.
    """
    traces: dict[str, dict[str, Trace]] = {name: {} for name in problems}
    for way, minimiser in ways.items():
        print(f"{way} ...", flush=True)
        for name, problem in problems.items():
            if _takes(way, problem):
                path = folder / f"{way}, {name}, {budgets[name]}.json"
                traces[name][way] = _kept(path, minimiser, problem, budgets[name])
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


def trace_folder(out: Path) -> Path:
    """The folder for the traces; another one when the code changes that they come from."""
    modules = [Path(str(module.__file__)) for module in (minimisers, solver_problems)]
    library = Path(str(advjax.__file__)).parent / "solvers"
    code = files.digest(jax.__version__, *modules, *sorted(library.rglob("*.py")))
    return out / "solvers-traces" / code


def _takes(way: str, problem: Problem) -> bool:
    if way in minimisers.WITHOUT_BOUNDS and problem.bounded:
        return False
    return not (way in minimisers.PEERS and _is_large(problem))


def _kept(path: Path, minimiser: Minimiser, problem: Problem, budget: int) -> Trace:
    """The least value so far at each evaluation, read if it was saved before."""
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    values = np.nan_to_num(minimiser(problem, budget), nan=np.inf, posinf=np.inf)
    trace = np.minimum.accumulate(values).tolist()
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(trace)
    files.write_whole(path, lambda file: file.write_text(text, encoding="utf-8"))
    return trace


def reached(trace: Sequence[float], first: float, least: float) -> int:
    """Count the evaluations until the objective came near the least value."""
    near = np.flatnonzero(np.asarray(trace) <= least + ACCURACY * (first - least))
    return int(near[0]) + 1 if len(near) else UNSOLVED


# --- quadratic programs, and scaled objectives -----------------------------------------------


def quadratic_programs(count: int, condition: float, budget: int = 2000) -> Row:
    """Count evaluations of ours (memory 10) and SciPy's on random box QPs of 20 variables."""
    taken: dict[str, list[int]] = {"advjax": [], "SciPy": []}
    ends = []
    for seed in range(count):
        problem = solver_problems.box_qp(seed, condition=condition)
        mine, status = minimisers.trace_and_status(problem, budget)
        theirs = minimisers.scipy(problem, budget)
        least = min(*mine, *theirs)
        taken["advjax"].append(reached(mine, mine[0], least))
        taken["SciPy"].append(reached(theirs, mine[0], least))
        ends.append(status)
    solved = {
        way: [count for count in counts if count != UNSOLVED] for way, counts in taken.items()
    }
    return {
        "condition": condition,
        "count": count,
        "solved": {way: len(counts) for way, counts in solved.items()},
        "mean": {way: float(np.mean(counts)) if counts else None for way, counts in solved.items()},
        "most": {way: max(counts, default=None) for way, counts in solved.items()},
        "out_of_budget": sum(status == solvers.Status.RUNNING for status in ends),
    }


def scales(problems: Mapping[str, Problem], budget: int) -> Row:
    """Count how often the first evaluations stay the same when the objective is scaled."""
    same = same_status = total = 0
    for problem in problems.values():
        if _is_large(problem):
            continue
        plain, status = minimisers.trace_and_status(problem, budget)
        first = np.asarray(plain[:15])
        for scale in SCALES:
            scaled, scaled_status = minimisers.trace_and_status(problem, budget, scale=scale)
            other = np.asarray(scaled[: len(first)])
            total += 1
            same += len(other) == len(first) and np.allclose(other, first, rtol=1e-5, atol=1e-300)
            same_status += scaled_status == status
    return {"runs": total, "same_first_15": int(same), "same_status": int(same_status)}


# --- what is shown ---------------------------------------------------------------------------


def describe(content: Content) -> str:
    """A line for each minimiser, and one for each kind of quadratic program."""
    run = content["runs"][0]
    rows, scale = run["problems"], run["scales"]
    ways = [way for way in COLOURS if any(way in row["evaluations"] for row in rows)]
    programs = markdown.table(
        [
            ("box QPs of condition", f"{row['condition']:.0e}"),
            ("advjax, memory 10", _solved_programs(row, "advjax")),
            ("SciPy", _solved_programs(row, "SciPy")),
        ]
        for row in run["quadratic_programs"]
    )
    return f"""\
{len(rows)} problems, {sum(row["bounded"] for row in rows)} of them with bounds. The ratio is that
of the evaluations to SciPy's, on the problems that both solved.

{markdown.table(_against_scipy(rows, way) for way in ways)}

{programs}

With the objective times {" and times ".join(f"{scale:g}" for scale in SCALES)}: the same first 15
evaluations in {scale["same_first_15"]} of {scale["runs"]} runs, the same status at the end in
{scale["same_status"]}.

![The fraction of problems solved against the evaluations](solvers.png)"""


def _solved_programs(row: Row, way: str) -> str:
    solved = f"{row['solved'][way]} of {row['count']}"
    if not row["solved"][way]:
        return solved
    return f"{solved}, {row['mean'][way]:.0f} evaluations, at most {row['most'][way]}"


def _against_scipy(rows: Iterable[Row], way: str) -> list[tuple[str, str]]:
    found = [row["evaluations"] for row in rows if way in row["evaluations"]]
    ratios = [
        evaluations[way] / evaluations["SciPy"]
        for evaluations in found
        if UNSOLVED not in (evaluations[way], evaluations["SciPy"])
    ]
    solved = sum(evaluations[way] != UNSOLVED for evaluations in found)
    return [
        ("minimiser", way),
        ("solved", f"{solved} of {len(found)}"),
        ("ratio, geometric mean", f"{np.exp(np.mean(np.log(ratios))):.2f}" if ratios else "-"),
        ("largest ratio", f"{max(ratios):.1f}" if ratios else "-"),
    ]


def draw(content: Content, arrays: Arrays) -> dict[str, Figure]:
    """Performance profiles (Dolan and More, 2002), for problems with and without bounds."""
    del arrays
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    factors = np.geomspace(1, 16, 200)
    for axis, bounded in zip(axes, (True, False), strict=True):
        problems = [row for row in content["runs"][0]["problems"] if row["bounded"] == bounded]
        for way, colour in COLOURS.items():
            found = [row["evaluations"] for row in problems if way in row["evaluations"]]
            if found:
                ratios = np.array([_ratio_to_the_best(evaluations, way) for evaluations in found])
                fractions = [np.mean(ratios <= factor) for factor in factors]
                axis.plot(factors, fractions, color=colour, label=way)
        axis.set(
            xscale="log",
            xlabel="evaluations, in multiples of the best minimiser's",
            title=f"{len(problems)} problems {'with' if bounded else 'without'} bounds",
            xlim=(1, 16),
            ylim=(0, 1.02),
        )
        axis.set_xticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
        axis.minorticks_off()
        if axis.lines:
            axis.legend(fontsize=8, loc="lower right")
    axes[0].set_ylabel("fraction solved")
    return {"solvers.png": figure}


def _ratio_to_the_best(evaluations: Mapping[str, int], way: str) -> float:
    best = min((count for count in evaluations.values() if count != UNSOLVED), default=1)
    return float("inf") if evaluations[way] == UNSOLVED else evaluations[way] / best
