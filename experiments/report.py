"""All of these beside the paper's numbers (every table; 90 min; MNIST or a sample).

Runs each experiment, or reuses the numbers that are already in the folder if they were measured
with the same options, and writes REPORT.md from the JSON files alone: first the paper's claims and
our verdicts, then each experiment with its method, its numbers and its command. Experiments whose
packages or data are missing here are shown too if they were measured before; otherwise the report
names them.
"""

import dataclasses
import importlib
import inspect
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

from advjax import files
from experiments import EXPERIMENTS
from experiments.common import markdown, measure
from experiments.common.measure import Content
from experiments.common.options import PHOTOGRAPHS, DataOptions, DigitOptions


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(DataOptions):
    """Runs the experiments of the report that have not been run, and writes it."""

    out: Path = Path("results")
    """The folder for the numbers, the figures and REPORT.md."""
    quick: bool = False
    """Run each experiment in its quick form: ten minutes in all, for a trial."""
    fresh: bool = False
    """Measure everything again, even if it is in the folder."""

    def of(self, experiment: ModuleType) -> measure.Options:
        """The options of an experiment of the report."""
        options = experiment.Options(out=self.out, quick=self.quick, reuse=not self.fresh)
        if isinstance(options, DigitOptions):
            return dataclasses.replace(options, dataset=self.dataset, source=self.source)
        return options


def write(options: Options) -> None:
    """Run the experiments of the report that have not been run, and write it."""
    sections: list[tuple[ModuleType, Content]] = []
    missing: dict[str, str] = {}
    for name in (name for name, in_report in EXPERIMENTS.items() if in_report):
        print(f"\n{name}\n", flush=True)
        module = importlib.import_module(f"experiments.{name}")
        content: Content | None
        try:
            content = measure.run(module, options.of(module))
        except (ImportError, FileNotFoundError) as error:
            print(f"{name} cannot be measured here: {error}", flush=True)
            content = measure.saved(module, options.of(module))
            if content is None:
                missing[name] = str(error)
                continue
        sections.append((module, content))
    text = compose(sections, missing)
    path = options.out / "REPORT.md"
    files.write_whole(path, lambda file: file.write_text(text, encoding="utf-8"))
    print(f"\nSaved\n  {path}")


def compose(
    sections: list[tuple[ModuleType, Content]], missing: Mapping[str, str] | None = None
) -> str:
    """Compose the report from what the experiments saved, and name those that are missing."""
    claims = [claim for module, content in sections for claim in module.claims(content)]
    table = markdown.grid(
        ("the paper's claim", "its evidence", "ours", "verdict"),
        [(claim.claim, claim.paper, claim.ours, f"**{claim.verdict}**") for claim in claims],
        names=4,
    )
    parts = [
        "# The paper's results, measured again",
        "[Intriguing properties of neural networks](https://arxiv.org/abs/1312.6199) (Szegedy et "
        "al., 2013). Made by `python -m experiments report` from the JSON files beside it. Numbers "
        "in square brackets are 95 % intervals over seeds; each seed retrains the networks and "
        "draws other images. Numbers in round brackets are the paper's, with ✓ where the "
        "intervals of both agree and ✗ where they do not.",
        "## The claims",
        table,
    ]
    for module, content in sections:
        summary, _, method = (inspect.getdoc(module) or "").partition("\n\n")
        parts += [
            f"## {summary.partition(';')[0]})",
            method,
            module.describe(content),
            provenance(measure.name_of(module), content),
        ]
    if missing:
        reasons = "\n".join(f"- `{name}`: {reason}" for name, reason in missing.items())
        parts += [
            "## Not measured",
            "There are no numbers for these experiments, and they could not be measured where this "
            f"report was written:\n\n{reasons}",
        ]
    return "\n\n".join(parts) + "\n"


def provenance(name: str, content: Content) -> str:
    """The command, the data, the seeds and the time of an experiment."""
    config = content["config"]
    trained = " Networks that an earlier experiment trained are reused."
    if config["dataset"] == PHOTOGRAPHS:
        trained = ""
    made_with = content["made_with"]
    seeds = "seed 0" if config["seeds"] == 1 else f"seeds 0 to {config['seeds'] - 1}"
    return (
        f"<sub>`{content['command']}`; {config['dataset']} ({config['source']}); {seeds}; "
        f"{content['minutes']:.1f} min on {made_with['device']}, "
        f"jax {made_with['jax']}; [{name}.json]({name}.json).{trained}</sub>"
    )
