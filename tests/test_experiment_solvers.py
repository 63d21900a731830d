"""The textbook problems against the literature, and what is made of the counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import advjax.solvers
from experiments import solvers
from experiments.common import minimisers
from experiments.common.solver_problems import suite
from tests import experiment_runs

# The objective at the standard start, as More, Garbow and Hillstrom's definitions give it, and at a
# minimum that they or Hock and Schittkowski print.
STARTS = {
    "MGH 1 Rosenbrock": 24.2,
    "MGH 2 Freudenstein-Roth": 400.5,
    "MGH 4 Brown badly scaled": 999998000003.0,
    "MGH 5 Beale": 14.203125,
    "MGH 7 helical valley": 2500.0,
    "MGH 8 Bard": 41.6817,
    "MGH 11 Gulf": 12.1107,
    "MGH 12 Box 3D": 1031.1538,
    "MGH 13 Powell singular": 215.0,
    "MGH 14 Wood": 19192.0,
    "MGH 16 Brown-Dennis": 7926693.3,
    "MGH 17 Osborne 1": 0.879026,
    "MGH 18 Biggs EXP6": 0.7790701,
    "MGH 19 Osborne 2": 2.0934,
    "MGH 20 Watson, n = 6": 30.0,
}
MINIMA = {
    "MGH 1 Rosenbrock": ([1, 1], 0),
    "MGH 4 Brown badly scaled": ([1e6, 2e-6], 0),
    "MGH 5 Beale": ([3, 0.5], 0),
    "MGH 6 Jennrich-Sampson": ([0.257825, 0.257825], 124.362),
    "MGH 7 helical valley": ([1, 0, 0], 0),
    "MGH 14 Wood": ([1, 1, 1, 1], 0),
    "HS 4": ([1, 0], 8 / 3),
    "HS 5": ([0.5 - np.pi / 3, -0.5 - np.pi / 3], -np.sqrt(3) / 2 - np.pi / 3),
    "HS 45": ([1, 2, 3, 4, 5], 1),
    "HS 110": ([9.35025655] * 10, -45.77846971),
}
PROBLEMS = suite(large=False)
FEW = ("MGH 5 Beale", "HS 5")

quick = experiment_runs.quick(solvers)


@pytest.mark.parametrize("name", STARTS)
def test_a_problem_starts_where_the_literature_starts(name):
    with jax.enable_x64(True):
        value = float(PROBLEMS[name].fun(jnp.asarray(PROBLEMS[name].x0)))
    assert value == pytest.approx(STARTS[name], rel=1e-5)


@pytest.mark.parametrize("name", MINIMA)
def test_a_problem_has_the_minimum_that_the_literature_prints(name):
    x, least = MINIMA[name]
    with jax.enable_x64(True):
        value = float(PROBLEMS[name].fun(jnp.asarray(x, float)))
    assert value == pytest.approx(least, rel=1e-5, abs=1e-12)


def test_solved_is_the_first_evaluation_near_the_least_value():
    assert solvers.reached([8.0, 2.0, 1.0 + 6e-6, 1.0], first=8.0, least=1.0) == 3
    assert solvers.reached([8.0, 2.0], first=8.0, least=1.0) == solvers.UNSOLVED


def test_stepped_from_outside_our_solver_does_what_minimize_does():
    problem = PROBLEMS["chained Rosenbrock, n = 10"]
    with jax.enable_x64(True):
        trace = minimisers.ours(problem, 30)
        inside = [
            float(
                advjax.solvers.minimize(
                    problem.fun, jnp.asarray(problem.x0), tol=0, ftol=0, max_evals=count
                ).value
            )
            for count in (1, 30)
        ]
    assert [trace[0], min(trace)] == pytest.approx(inside, rel=1e-6)


def test_a_run_that_was_stopped_starts_from_the_traces_that_it_saved(tmp_path):
    problems = {name: PROBLEMS[name] for name in FEW}
    budgets = dict.fromkeys(FEW, 200)
    calls = []

    def counted(problem, budget):
        if len(calls) == 1:
            raise KeyboardInterrupt
        calls.append(problem)
        return minimisers.scipy(problem, budget)

    with jax.enable_x64(True):
        with pytest.raises(KeyboardInterrupt):
            solvers.compare(problems, {"SciPy": counted}, budgets, tmp_path)
        calls.append("after the interruption")
        resumed = solvers.compare(problems, {"SciPy": counted}, budgets, tmp_path)
        fresh = solvers.compare(
            problems, {"SciPy": minimisers.scipy}, budgets, tmp_path / "another"
        )
    assert calls == [problems[FEW[0]], "after the interruption", problems[FEW[1]]]
    assert resumed == fresh


def test_traces_of_other_code_are_not_reused(tmp_path, monkeypatch):
    before = solvers.trace_folder(tmp_path)
    assert solvers.trace_folder(tmp_path) == before
    other = tmp_path / "solver_problems.py"
    other.write_text("changed = True\n")
    monkeypatch.setattr(solvers.solver_problems, "__file__", str(other))
    assert solvers.trace_folder(tmp_path) != before


@pytest.mark.parametrize("way", ["jaxopt", "optax", "optimistix"])
def test_a_peer_minimises_within_its_budget(way):
    if way == "optimistix":
        pytest.importorskip("optimistix")
    problem = PROBLEMS["MGH 5 Beale"]
    with jax.enable_x64(True):
        trace = minimisers.PEERS[way](problem, 200)
        short = minimisers.PEERS[way](problem, 5)
    assert trace[0] == pytest.approx(STARTS["MGH 5 Beale"])
    assert min(trace) < 1e-6
    assert len(short) <= 5


def test_the_profile_and_the_table_come_from_the_numbers():
    rows = [
        {"problem": "a", "variables": 2, "bounded": True, "least": 0.0, "evaluations": evaluations}
        for evaluations in (
            {"advjax, memory 10": 10, "SciPy": 20},
            {"advjax, memory 10": 40, "SciPy": 20},
            {"advjax, memory 10": solvers.UNSOLVED, "SciPy": 5},
        )
    ]
    program = {
        "condition": 1e4,
        "count": 2,
        "solved": {"advjax": 2, "SciPy": 0},
        "mean": {"advjax": 41.0, "SciPy": None},
        "most": {"advjax": 44, "SciPy": None},
    }
    run = {
        "problems": rows,
        "quadratic_programs": [program],
        "scales": {"runs": 2, "same_first_15": 2, "same_status": 1},
    }
    content = {"runs": [run]}
    text = solvers.describe(content)
    assert "2 of 3" in text
    assert "1.00" in text  # the geometric mean of 1/2 and 2
    assert "2 of 2, 41 evaluations, at most 44" in text
    assert "0 of 2" in text
    axis = solvers.draw(content, {})["solvers.png"].axes[0]
    by_name = {line.get_label(): line.get_ydata() for line in axis.lines}
    assert by_name["advjax, memory 10"][[0, -1]] == pytest.approx([1 / 3, 2 / 3])
    assert by_name["SciPy"][[0, -1]] == pytest.approx([2 / 3, 1])


@pytest.mark.slow
def test_a_trial_compares_the_minimisers_and_is_saved(quick, monkeypatch):
    (run,) = quick.content["runs"]
    evaluations = [row["evaluations"] for row in run["problems"]]
    assert all(set(found) == set(minimisers.OURS_AND_SCIPY) for found in evaluations)
    assert all(max(found.values()) > 0 for found in evaluations), "some minimiser found the least"
    assert {row["bounded"] for row in run["problems"]} == {True, False}
    for row in run["quadratic_programs"]:
        assert row["solved"] == {"advjax": row["count"], "SciPy": row["count"]}
        assert row["mean"]["advjax"] < 1.5 * row["mean"]["SciPy"]
    assert quick.content["command"] == (
        "python -m experiments solvers --budget 1000 --large-budget 10000 --programs 3 --quick"
    )
    assert any(solvers.trace_folder(quick.folder).iterdir())
    experiment_runs.check(quick, monkeypatch)
