"""Runs an experiment, `python -m experiments NAME`, or the report; without a name, lists them.

The first line of a module's docstring is its line in the list.
"""

import ast
import contextlib
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments import EXPERIMENTS

COMMANDS = ("report", *EXPERIMENTS)


def overview() -> str:
    """List the experiments, one line each, without importing them."""
    width = max(map(len, COMMANDS))
    lines = ["python -m experiments NAME [--help]", ""]
    for name in COMMANDS:
        source = Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8")
        doc = ast.get_docstring(ast.parse(source)) or "?"
        lines.append(f"  {name:{width}}  {doc.splitlines()[0]}")
    return "\n".join(lines)


def run(args: Sequence[str]) -> int:
    """Run what the command line asks for; return the exit status."""
    if not args or args[0] in ("-h", "--help"):
        print(overview())
        return 0
    name, *flags = args
    if name not in COMMANDS:
        print(f"NAME: {name!r}, expected one of {', '.join(COMMANDS)}.", file=sys.stderr)
        return 2
    try:
        import tyro
    except ImportError:
        print(
            "The experiments need more packages: pip install 'advjax[experiments]'.",
            file=sys.stderr,
        )
        return 1
    from experiments.common import measure

    module = importlib.import_module(f"experiments.{name}")
    use_all_cores()
    try:
        options = tyro.cli(
            module.Options,
            args=flags,
            prog=f"python -m experiments {name}",
            config=(tyro.conf.FlagCreatePairsOff,),
        )
        if name == "report":
            module.write(options)
        else:
            measure.run(module, options)
    except (ImportError, FileNotFoundError) as error:  # the message says what to install or to give
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    return 0


def use_all_cores() -> None:
    """Use one device per core, as an attack on small images keeps only one core busy."""
    import jax

    with contextlib.suppress(RuntimeError):  # if JAX is already initialised
        jax.config.update("jax_num_cpu_devices", min(8, os.cpu_count() or 1))


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
