"""Runs an experiment: `python -m experiments NAME`; without a name, lists what there is.

An experiment is a module with one function, `main`, whose keyword arguments are its flags. The
first line of the module's docstring is its line in the list.
"""

import ast
import contextlib
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

EXPERIMENTS = (
    "quickstart",
    "attack",
    "report",
    "table1",
    "table2",
    "table3",
    "table4",
    "table5",
    "fgsm",
    "figure1",
    "rotation",
    "figure3",
    "figure4",
    "figure5",
    "figure6",
    "ostriches",
    "bounds",
    "figure7",
    "adversarial",
    "lipschitz",
    "benchmark",
    "throughput",
    "solvers",
)


def overview() -> str:
    """One line for each experiment, read without importing it."""
    width = max(map(len, EXPERIMENTS))
    lines = ["python -m experiments NAME [--help]", ""]
    for name in EXPERIMENTS:
        source = Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8")
        doc = ast.get_docstring(ast.parse(source)) or "?"
        lines.append(f"  {name:{width}}  {doc.splitlines()[0]}")
    return "\n".join(lines)


def run(args: Sequence[str]) -> int:
    """Runs what the command line asks for; returns the exit status."""
    if not args or args[0] in ("-h", "--help"):
        print(overview())
        return 0
    name, *flags = args
    if name not in EXPERIMENTS:
        print(
            f"{name!r} is no experiment; choose one of {', '.join(EXPERIMENTS)}.", file=sys.stderr
        )
        return 2
    try:
        import tyro
    except ImportError:
        print("The experiments need more: pip install 'advjax[experiments]'.", file=sys.stderr)
        return 1
    main = importlib.import_module(f"experiments.{name}").main
    use_all_cores()
    try:
        tyro.cli(main, args=flags, prog=f"python -m experiments {name}")
    except (ImportError, FileNotFoundError) as error:  # the message says what to install or to give
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    return 0


def use_all_cores() -> None:
    """A device for each core: attacks on small images keep but one busy each."""
    import jax

    with contextlib.suppress(RuntimeError):  # as when JAX has computed something already
        jax.config.update("jax_num_cpu_devices", min(8, os.cpu_count() or 1))


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
