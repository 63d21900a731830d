"""How the experiments measure, print and keep what they find.

An experiment is a module with three functions. `main(...)` measures, prints and saves: its keyword
arguments are the command's flags. `describe(content)` lays what was saved beside the paper's
numbers, in Markdown; `claims(content)` says which of the paper's claims it speaks of, and how it
bears them out. Both read nothing but `content`, so that the report is made of saved numbers alone.
"""

import hashlib
import json
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import scipy.stats

from advjax import data, files, transfer

Name = Literal["mnist", "fashion_mnist"]
Source = Literal["auto", "tfds", "embedded"]
Row = dict[str, Any]
"""A row of a table, as it goes into the JSON file."""
Verdict = Literal["holds", "holds in part", "does not hold", "cannot be tested here"]

PHOTOGRAPHS = "photographs"
"""The data set of the experiments that are not on MNIST."""

PAPER_IMAGES = 256
"""How many images the paper's rates are fractions of, by all that its decimals tell."""

_WIDEST = 48  # characters of a table's column; longer cells stand out


class Claim(NamedTuple):
    """What the paper says, on what evidence, what we found, and what follows."""

    claim: str
    paper: str
    ours: str
    verdict: Verdict


class Estimate(NamedTuple):
    """A mean over seeds, with its 95 % interval."""

    mean: float
    low: float
    high: float


# --- data ------------------------------------------------------------------------------------


def load(name: Name, source: Source, *, quick: bool = False) -> tuple[data.Dataset, data.Dataset]:
    """Loads the training and the test images, both from one source, and says which.

    Quick, they are the sample of MNIST inside the package, or as many images of the other set.
    """
    if quick and name == "mnist":
        source = "embedded"
    with warnings.catch_warnings(record=True) as caught:
        train = data.load(name, "train", source=source)
    for warning in caught:
        print(f"Note: {warning.message}", file=sys.stderr)
    test = data.load(name, "test", source="tfds" if train.source == "tfds" else "embedded")
    if quick:
        train, test = (
            data.Dataset(split.images[:n], split.labels[:n], split.source)
            for split, n in ((train, 5000), (test, 1000))
        )
    where = {"tfds": "tensorflow-datasets", "embedded": "the sample inside the package"}
    print(
        f"{name}, {where[train.source]}: {len(train.labels):,} training and "
        f"{len(test.labels):,} test images.",
        flush=True,
    )
    return train, test


# --- measuring -------------------------------------------------------------------------------


def measure(
    name: str,
    measure_seed: Callable[[int], Row],
    *,
    seeds: int,
    config: Mapping[str, Any],
    splits: Sequence[data.Dataset],
    out: Path,
    reuse: bool,
) -> dict[str, Any]:
    """Measures once for each seed, and saves `name.json`.

    What a seed gave is kept as it comes, in `out/name.partial`, so that a run that was stopped goes
    on; the programs, the data and the options must be the same, or it is measured anew.

    Args:
        name: The experiment.
        measure_seed: What one seed gives, as JSON holds it: measured with that seed alone.
        seeds: How many, from 0.
        config: The options that bear on the numbers, by their flags.
        splits: The data that it is measured on.
        out: The folder for the results.
        reuse: Whether to take the numbers in `out`, if they are of the same options and source.

    Returns:
        What was saved: under "runs" a row for each seed, and what made them.
    """
    config = {**config, "seeds": seeds, "source": splits[0].source}
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}.json"
    if reuse and (content := _saved(path, config)) is not None:
        return content
    partial = out / f"{name}.partial"
    partial.mkdir(exist_ok=True)
    run = _digest(config, splits)
    rows = [_kept(partial / f"{seed}.json", run, measure_seed, seed) for seed in range(seeds)]
    content = {
        "experiment": name,
        "command": _command(name, config),
        "config": config,
        "minutes": sum(row["seconds"] for row in rows) / 60,
        "runs": [row["found"] for row in rows],
    }
    content = save_json(path, content)
    for kept in partial.iterdir():
        kept.unlink()
    partial.rmdir()
    return content


def _kept(path: Path, run: str, measure_seed: Callable[[int], Row], seed: int) -> Row:
    """What a seed gives: read, if it was measured before in the same run."""
    row = _read(path)
    if row is not None and row.get("run") == run:
        print(f"Seed {seed}: measured before, read from {path}", flush=True)
        return row
    start = time.monotonic()
    found = measure_seed(seed)
    row = {"run": run, "seconds": time.monotonic() - start, "found": found}
    text = json.dumps(row)
    files.write_whole(path, lambda file: file.write_text(text, encoding="utf-8"))
    return json.loads(text)


def _saved(path: Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    content = _read(path)
    if content is None:
        return None
    found = content.get("config")
    if found != json.loads(json.dumps(config)):
        print(f"{path} is of {found}, not of {config}: measured anew.", flush=True)
        return None
    print(f"{path}: measured before.", flush=True)
    return content


def saved_numbers(path: Path, *, dataset: str, quick: bool) -> dict[str, Any] | None:
    """What was measured before, read without the data or packages that measuring it takes."""
    content = _read(path)
    config = {} if content is None else content.get("config") or {}
    if (config.get("dataset"), config.get("quick")) != (dataset, quick):
        return None
    print(f"{path}: measured before.", flush=True)
    return content


def _read(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        print(f"{path} cannot be read ({error}): measured anew.", flush=True)
        return None
    return content if isinstance(content, dict) else None


def _digest(config: Mapping[str, Any], splits: Sequence[data.Dataset]) -> str:
    """Of the options, the images, and every line of code that could bear on the numbers."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for split in splits:
        for array in (split.images, split.labels):
            digest.update(np.ascontiguousarray(array).data)
    here = Path(__file__).parents[1]
    for source in sorted([*here.rglob("*.py"), *Path(data.__file__).parents[1].rglob("*.py")]):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def _command(name: str, config: Mapping[str, Any]) -> str:
    flags = []
    config = dict(config)
    if config["dataset"] == PHOTOGRAPHS:
        del config["dataset"]
        if config["seeds"] == 1:  # perhaps no seed bears on it
            del config["seeds"]
        folder = config.pop("source")
        if folder != "foolbox":
            config["images"] = folder
    for option, value in config.items():
        flag = f"--{option.replace('_', '-')}"
        if isinstance(value, bool):
            flags += [flag] if value else []
        else:
            flags.append(f"{flag} {value}")
    return " ".join(["python -m experiments", name, *flags])


def save_json(path: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """Writes the numbers, beside the versions that gave them; returns what is read again."""
    made_with = {"jax": jax.__version__, "device": jax.devices()[0].device_kind}
    entries = {**content, "made_with": made_with}.items()
    lines = (f"{json.dumps(name)}: {json.dumps(value)}" for name, value in entries)
    text = "{\n" + ",\n".join(lines) + "\n}\n"
    files.write_whole(path, lambda file: file.write_text(text, encoding="utf-8"))
    return json.loads(text)


def over_seeds(content: Mapping[str, Any]) -> Iterator[tuple[Row, ...]]:
    """For each of the rows that every seed has, what each seed gave."""
    return zip(*(run["rows"] for run in content["runs"]), strict=True)


# --- intervals -------------------------------------------------------------------------------


def mean(values: Sequence[float]) -> Estimate:
    """The mean over seeds, with Student's 95 % interval; of one seed there is none."""
    if len(values) == 1:
        return Estimate(values[0], math.nan, math.nan)
    centre = float(np.mean(values))
    half = _t(len(values)) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return Estimate(centre, centre - half, centre + half)


def share(wrong: Sequence[int], total: Sequence[int]) -> Estimate:
    """A share of images over seeds: the wider of Student's interval and Wilson's over all images.

    Student's has the spread of nets and of images in it, but no width where all seeds agree, as
    they do at 0 % and at 100 %.
    """
    among_seeds = mean([k / n for k, n in zip(wrong, total, strict=True)])
    among_images = transfer.wilson_interval(sum(wrong), sum(total))
    low, high = (np.array(ends) for ends in zip(among_seeds[1:], among_images, strict=True))
    return Estimate(among_seeds.mean, max(0.0, np.nanmin(low)), min(1.0, np.nanmax(high)))


def agrees(estimate: Estimate, printed: float) -> bool:
    """Whether a share that the paper prints of its images could be of ours: the intervals meet."""
    low, high = transfer.wilson_interval(round(printed * PAPER_IMAGES), PAPER_IMAGES)
    return bool(low <= estimate.high and estimate.low <= high)


def predicts(values: Sequence[float], printed: float) -> bool:
    """Whether a number could be one more seed's: it is within their 95 % prediction interval."""
    if len(values) == 1:
        return False
    half = _t(len(values)) * np.std(values, ddof=1) * math.sqrt(1 + 1 / len(values))
    return bool(abs(printed - np.mean(values)) <= half)


def _t(n: int) -> float:
    return float(scipy.stats.t.ppf(0.975, n - 1))


def verdict(borne_out: Iterable[bool]) -> Verdict:
    """On a claim, of which each part was borne out or not."""
    parts = list(borne_out)
    return "holds" if all(parts) else "holds in part" if any(parts) else "does not hold"


# --- words -----------------------------------------------------------------------------------


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, names: int = 1) -> str:
    """Markdown that reads well as it is: the first columns are names, the others numbers."""
    lines = [[cell.replace("|", "\\|") for cell in line] for line in (header, *rows)]
    widths = [min(max(map(len, column)), _WIDEST) for column in zip(*lines, strict=True)]
    lines.insert(
        1, ["-" * width if i < names else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    )
    return "\n".join(
        "| "
        + " | ".join(
            cell.ljust(width) if i < names else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        + " |"
        for line in lines
    )


def percent(value: float | Estimate, digits: int = 2) -> str:
    """A share in [0, 1] as percent, "1.64 %", or with its interval, "1.64 [1.50, 1.78] %"."""
    if isinstance(value, Estimate):
        return f"{number(Estimate(*(100 * end for end in value)), digits)} %"
    return f"{100 * value:.{digits}f} %"


def number(value: float | Estimate, digits: int = 4) -> str:
    """A number, and its interval where it has one."""
    if not isinstance(value, Estimate):
        return f"{value:.{digits}f}"
    if math.isnan(value.low):
        return f"{value.mean:.{digits}f}"
    return f"{value.mean:.{digits}f} [{value.low:.{digits}f}, {value.high:.{digits}f}]"


def saved(paths: Mapping[Path, str]) -> str:
    """Says where everything was saved, and what it is."""
    width = max(len(str(path)) for path in paths)
    return "\n".join(["Saved", *(f"  {path!s:{width}}  {what}" for path, what in paths.items())])


def show(name: str, description: str, out: Path) -> None:
    """Prints what an experiment found, and where its numbers are."""
    print(f"\n{description}\n")
    print(saved({out / f"{name}.json": "the numbers above"}))
