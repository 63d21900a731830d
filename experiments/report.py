"""All of these beside the paper's numbers (every table; 90 min; MNIST or a sample).

Runs each experiment, or takes the numbers that are in the folder already where they are of the same
options, and writes REPORT.md from the JSON files alone: first the paper's claims and what became of
them, then each experiment with its method, its numbers and the command that makes them. Numbers of
experiments whose packages or data are missing here are shown too; where there are none, it says so.
"""

import importlib
import inspect
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from advjax import files
from experiments.common import measure as results

SECTIONS = (
    "table1",
    "table2",
    "table3",
    "table4",
    "fgsm",
    "figure1",
    "rotation",
    "figure7",
    "adversarial",
    "table5",
    "lipschitz",
)
"""The sections on MNIST."""

PHOTOGRAPHS = ("figure3", "figure4", "figure5", "figure6", "ostriches", "bounds")
"""Those on photographs, with packages that not everybody has."""


def main(
    *,
    dataset: results.Name = "mnist",
    source: results.Source = "auto",
    out: Path = Path("results"),
    quick: bool = False,
    fresh: bool = False,
) -> None:
    """Runs the experiments of the report that have not been run, and writes it.

    Args:
        dataset: The data set.
        source: Where it comes from: tensorflow-datasets, the sample of MNIST inside the package, or
            the first of both that can be had.
        out: The folder for the numbers, the figures and REPORT.md.
        quick: Each experiment in its quick form: ten minutes, for a trial.
        fresh: Whether to measure anew what is in the folder already.
    """
    sections: list[tuple[ModuleType, dict[str, Any]]] = []
    missing: dict[str, str] = {}
    for name in (*SECTIONS, *PHOTOGRAPHS):
        print(f"\n{name}\n", flush=True)
        module = importlib.import_module(f"experiments.{name}")
        options = {} if name in PHOTOGRAPHS else {"dataset": dataset, "source": source}
        try:
            content = module.main(**options, out=out, quick=quick, reuse=not fresh)
        except (ImportError, FileNotFoundError) as error:
            print(f"{name} cannot be measured here: {error}", flush=True)
            images = results.PHOTOGRAPHS if name in PHOTOGRAPHS else dataset
            content = results.saved_numbers(out / f"{name}.json", dataset=images, quick=quick)
            if content is None:
                missing[name] = str(error)
                continue
        sections.append((module, content))
    text = compose(sections, missing)
    path = out / "REPORT.md"
    files.write_whole(path, lambda file: file.write_text(text, encoding="utf-8"))
    print()
    print(results.saved({path: "the report"}))


def compose(
    sections: list[tuple[ModuleType, dict[str, Any]]], missing: Mapping[str, str] | None = None
) -> str:
    """The report, of modules and what they saved; and why the missing experiments are missing."""
    claims = [claim for module, content in sections for claim in module.claims(content)]
    table = results.table(
        ("the paper's claim", "its evidence", "ours", "verdict"),
        [(claim.claim, claim.paper, claim.ours, f"**{claim.verdict}**") for claim in claims],
        names=4,
    )
    parts = [
        "# The paper's results, measured again",
        "[Intriguing properties of neural networks](https://arxiv.org/abs/1312.6199) (Szegedy et "
        "al., 2013). Made by `python -m experiments report` from the JSON files beside it; numbers "
        "in square brackets are 95 % intervals over seeds, each of which trains the nets anew and "
        "draws other images; numbers in round brackets are the paper's, with ✓ where they agree "
        "within the intervals of both and ✗ where not.",
        "## The claims",
        table,
    ]
    for module, content in sections:
        summary, _, method = (inspect.getdoc(module) or "").partition("\n\n")
        parts += [
            f"## {summary.partition(';')[0]})",
            method,
            module.describe(content),
            provenance(name_of(module), content),
        ]
    if missing:
        reasons = "\n".join(f"- `{name}`: {reason}" for name, reason in missing.items())
        parts += [
            "## Not measured",
            "There are no numbers of these experiments, and they could not be measured where this "
            f"was written:\n\n{reasons}",
        ]
    return "\n\n".join(parts) + "\n"


def provenance(name: str, content: dict[str, Any]) -> str:
    """The command, the data, the seeds and the time of an experiment."""
    config = content["config"]
    trained = " Nets that an earlier experiment trained are not trained again."
    if config["dataset"] == results.PHOTOGRAPHS:
        trained = ""
    made_with = content["made_with"]
    seeds = "seed 0" if config["seeds"] == 1 else f"seeds 0 to {config['seeds'] - 1}"
    return (
        f"<sub>`{content['command']}`; {config['dataset']} ({config['source']}); {seeds}; "
        f"{content['minutes']:.1f} min on {made_with['device']}, "
        f"jax {made_with['jax']}; [{name}.json]({name}.json).{trained}</sub>"
    )


def name_of(module: ModuleType) -> str:
    """The experiment's name on the command line."""
    return module.__name__.rpartition(".")[2]
