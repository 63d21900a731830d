"""Runs an experiment: measures seed by seed, saves, draws and prints.

An experiment is a module that imports from `experiments.common` and `advjax` alone:

- `Options`: a dataclass, of `common.options`; its fields are the flags of the command. Its method
  `load()` returns what is measured on, with the data sets under `splits`; there may be none.
- `measure(options, loaded, seed)`: the results of one seed, as JSON holds them. Arrays at the top
  level of the first seed's results are saved in an npz beside the JSON, to draw the figures from.
- `describe(content)`: Markdown that compares the saved numbers with the paper's.
- `claims(content)`, if it is in the report: the paper's claims that it tests, with verdicts.
- `draw(content, arrays)`, if it has figures: a figure for each file name.

The last three read nothing but what was saved, so that the report and its figures can be made again
without measuring.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from advjax import data, files
from experiments.common.options import PHOTOGRAPHS, Options

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = dict[str, Any]
"""A row of a table, as JSON holds it."""
Arrays = Mapping[str, np.ndarray]
"""The saved arrays that figures are drawn from."""
Content = dict[str, Any]
"""What is saved of an experiment: options, versions, and under "runs" a row per seed."""


def run(experiment: ModuleType, options: Options) -> Content:
    """Measure an experiment, or reuse its saved results if asked to; then draw and print it."""
    options = options.resolved()
    content = saved(experiment, options) if options.reuse else None
    if content is None:
        content = _measured(experiment, options)
    else:
        print(f"{_path(experiment, options)}: measured before.", flush=True)
    pictures = list(_draw(experiment, content, options.out))
    print(f"\n{experiment.describe(content)}\n\nSaved")
    for path in (_path(experiment, options), *pictures):
        print(f"  {path}")
    return content


def name_of(experiment: ModuleType) -> str:
    """The name of an experiment on the command line."""
    return experiment.__name__.rpartition(".")[2]


def saved(experiment: ModuleType, options: Options, source: str | None = None) -> Content | None:
    """Read what was measured before with the same options, if it was.

    This needs neither the data nor the packages for measuring.

    Args:
        experiment: The experiment.
        options: Its options.
        source: The source of the data; the expected one if None.
    """
    content = _read(_path(experiment, options))
    config = _config(options.resolved(), source)
    return content if content is not None and content.get("config") == config else None


def grouped(content: Content, *keys: str, within: str = "rows") -> dict[Any, list[Row]]:
    """Group the rows of all seeds by the value of a key, or of several."""
    groups: dict[Any, list[Row]] = {}
    for run in content["runs"]:
        for row in run[within]:
            values = tuple(row[key] for key in keys)
            groups.setdefault(values if len(keys) > 1 else values[0], []).append(row)
    return groups


# --- measuring -------------------------------------------------------------------------------


def _measured(experiment: ModuleType, options: Any) -> Content:
    """Measure seed by seed; a run that was stopped resumes with the interrupted seed.

    It resumes only if the program, the data and the options are the same.
    """
    loaded = options.load()
    source = loaded.splits[0].source if loaded.splits else options.expected_source
    path = _path(experiment, options)
    if options.reuse:
        content = saved(experiment, options, source)
        if content is not None:  # measured on the source that was found
            return content
        if (other := _read(path)) is not None:
            wanted = _config(options, source)
            print(f"{path}: measured with {other.get('config')}, expected {wanted}.", flush=True)
    config = _config(options, source)
    partial = path.with_suffix(".partial")
    partial.mkdir(parents=True, exist_ok=True)
    fingerprint = _digest(config, loaded.splits)
    rows = [
        _kept(partial, fingerprint, seed, lambda seed: experiment.measure(options, loaded, seed))
        for seed in range(config["seeds"])
    ]
    name = name_of(experiment)
    content = {
        "experiment": name,
        "command": options.command(name, source),
        "config": config,
        "minutes": sum(row["seconds"] for row in rows) / 60,
        "runs": [row["found"] for row in rows],
    }
    content = _save_json(path, content)
    _arrays_of(path).unlink(missing_ok=True)
    for kept in partial.iterdir():
        if kept.suffix == ".npz":
            kept.replace(_arrays_of(path))
        else:
            kept.unlink()
    partial.rmdir()
    return content


def _kept(folder: Path, fingerprint: str, seed: int, measure: Callable[[int], Row]) -> Row:
    """Measure one seed, or read its results if the same run has measured it before."""
    path = folder / f"{seed}.json"
    row = _read(path)
    if row is not None and row.get("run") == fingerprint:
        print(f"Seed {seed}: measured before, read from {path}", flush=True)
        return row
    start = time.monotonic()
    found = measure(seed)
    arrays: dict[str, Any] = {
        name: value for name, value in found.items() if isinstance(value, np.ndarray)
    }
    if arrays and seed == 0:
        files.write_whole(folder / "0.npz", lambda file: np.savez_compressed(file, **arrays))
    row = {
        "run": fingerprint,
        "seconds": time.monotonic() - start,
        "found": {name: value for name, value in found.items() if name not in arrays},
    }
    text = json.dumps(row)
    files.write_whole(path, lambda file: file.write_text(text, encoding="utf-8"))
    return json.loads(text)


def _config(options: Any, source: str | None) -> Row:
    config = {**options.config(), "source": source or options.expected_source}
    return json.loads(json.dumps(config))


def _path(experiment: ModuleType, options: Options) -> Path:
    return options.out / f"{name_of(experiment)}.json"


def _arrays_of(path: Path) -> Path:
    return path.with_suffix(".npz")


def _digest(config: Row, splits: Sequence[data.Dataset]) -> str:
    """Hash the options, the images, and all code that could affect the numbers."""
    folders = (Path(__file__).parents[1], Path(data.__file__).parents[1])
    code = [path for folder in folders for path in sorted(folder.rglob("*.py"))]
    arrays = [array for split in splits for array in (split.images, split.labels)]
    return files.digest(json.dumps(config, sort_keys=True), *arrays, *code)


def _read(path: Path) -> Content | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        print(f"{path} cannot be read ({error}): measured again.", flush=True)
        return None
    return content if isinstance(content, dict) else None


def _save_json(path: Path, content: Content) -> Content:
    """Write the numbers with the versions that produced them; return them as read back."""
    made_with = {"jax": jax.__version__, "device": jax.devices()[0].device_kind}
    entries = {**content, "made_with": made_with}.items()
    lines = (f"{json.dumps(name)}: {json.dumps(value)}" for name, value in entries)
    text = "{\n" + ",\n".join(lines) + "\n}\n"
    files.write_whole(path, lambda file: file.write_text(text, encoding="utf-8"))
    return json.loads(text)


# --- drawing ---------------------------------------------------------------------------------


class _Arrays(dict[str, np.ndarray]):
    """The arrays of an experiment; a missing one raises FileNotFoundError."""

    def __init__(self, path: Path):
        self.path = path
        if path.exists():
            with np.load(path) as arrays:
                super().__init__(arrays)

    def __missing__(self, name: str) -> np.ndarray:
        raise FileNotFoundError(f"{self.path}, which holds their data, is missing")


def _draw(experiment: ModuleType, content: Content, out: Path) -> Iterator[Path]:
    """Draw the figures of an experiment, and yield their paths."""
    if not hasattr(experiment, "draw"):
        return
    try:
        figures = experiment.draw(content, _Arrays(_arrays_of(out / name_of(experiment))))
    except FileNotFoundError as error:
        print(f"The figures are left as they are: {error}; measure again to make it.")
        return
    for name, figure in figures.items():
        if content["config"]["dataset"] == PHOTOGRAPHS:
            _save_in_few_colours(figure, out / name)
        else:
            figure.savefig(out / name)
        yield out / name


def _save_in_few_colours(figure: "Figure", path: Path) -> None:
    """Save a figure of photographs with 256 colours, which takes a third of the bytes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3]).quantize(256).save(path)
