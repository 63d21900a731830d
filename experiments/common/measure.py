"""Runs an experiment: measures seed by seed, saves, draws and prints.

An experiment is a module that imports from `experiments.common` and `advjax` alone:

- `Options`: a dataclass, of `common.options`; its fields are the flags of the command. Its method
  `load()` returns what is measured on, with the data sets under `splits`.
- `measure(options, loaded, seed)`: what one seed gives, as JSON holds it. Arrays at the top go into
  an npz beside the JSON, those of the first seed alone: the figure is drawn from them.
- `describe(content)`: what was saved beside the paper's numbers, in Markdown.
- `claims(content)`, for the report: which of the paper's claims it tests, and the verdicts.
- `draw(content, arrays)`, if it has figures: each by the name of its file.

The last three see saved numbers alone, so that the report and its figures can be made anew without
measuring.
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
"""What figures are drawn from."""
Content = dict[str, Any]
"""What is saved of an experiment: its options, what made it, and under "runs" a row a seed."""


def run(experiment: ModuleType, options: Options) -> Content:
    """Measures an experiment, or reads it if that is asked for; then draws and prints it."""
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
    """The experiment's name on the command line."""
    return experiment.__name__.rpartition(".")[2]


def saved(experiment: ModuleType, options: Options, source: str | None = None) -> Content | None:
    """What was measured before with the same options, if it was.

    Args:
        experiment: The experiment.
        options: Its options.
        source: Where the data come from; from where they are expected to, if None. Neither the data
            nor the packages that measuring takes need to be there.
    """
    content = _read(_path(experiment, options))
    config = _config(options.resolved(), source)
    return content if content is not None and content.get("config") == config else None


def grouped(content: Content, *keys: str, within: str = "rows") -> dict[Any, list[Row]]:
    """The rows of all seeds by the value of a key, or of several."""
    groups: dict[Any, list[Row]] = {}
    for run in content["runs"]:
        for row in run[within]:
            values = tuple(row[key] for key in keys)
            groups.setdefault(values if len(keys) > 1 else values[0], []).append(row)
    return groups


# --- measuring -------------------------------------------------------------------------------


def _measured(experiment: ModuleType, options: Any) -> Content:
    """Measures seed by seed; a run that was stopped goes on with the seed that was cut off.

    It goes on only if the program, the data and the options are the same.
    """
    loaded = options.load()
    source = loaded.splits[0].source
    path = _path(experiment, options)
    if options.reuse:
        content = saved(experiment, options, source)
        if content is not None:  # of the source that the data turned out to have
            return content
        if (other := _read(path)) is not None:
            print(f"{path} is of {other.get('config')}, not of {_config(options, source)}.")
    config = _config(options, source)
    partial = path.with_suffix(".partial")
    partial.mkdir(parents=True, exist_ok=True)
    made_of = _digest(config, loaded.splits)
    rows = [
        _kept(partial, made_of, seed, lambda seed: experiment.measure(options, loaded, seed))
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


def _kept(folder: Path, made_of: str, seed: int, measure: Callable[[int], Row]) -> Row:
    """What a seed gives: read, if it was measured before in the same run."""
    path = folder / f"{seed}.json"
    row = _read(path)
    if row is not None and row.get("run") == made_of:
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
        "run": made_of,
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
    """Of the options, the images, and every line of code that could bear on the numbers."""
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
        print(f"{path} cannot be read ({error}): measured anew.", flush=True)
        return None
    return content if isinstance(content, dict) else None


def _save_json(path: Path, content: Content) -> Content:
    """Writes the numbers, beside the versions that gave them; returns what is read again."""
    made_with = {"jax": jax.__version__, "device": jax.devices()[0].device_kind}
    entries = {**content, "made_with": made_with}.items()
    lines = (f"{json.dumps(name)}: {json.dumps(value)}" for name, value in entries)
    text = "{\n" + ",\n".join(lines) + "\n}\n"
    files.write_whole(path, lambda file: file.write_text(text, encoding="utf-8"))
    return json.loads(text)


# --- drawing ---------------------------------------------------------------------------------


class _Arrays(dict[str, np.ndarray]):
    """What a figure is drawn from."""

    def __init__(self, path: Path):
        self.path = path
        if path.exists():
            with np.load(path) as arrays:
                super().__init__(arrays)

    def __missing__(self, name: str) -> np.ndarray:
        raise FileNotFoundError(f"{self.path}, with what they are drawn from, is missing")


def _draw(experiment: ModuleType, content: Content, out: Path) -> Iterator[Path]:
    """Draws the figures of an experiment; yields where they are."""
    if not hasattr(experiment, "draw"):
        return
    try:
        figures = experiment.draw(content, _Arrays(_arrays_of(out / name_of(experiment))))
    except FileNotFoundError as error:
        print(f"The figures are left as they are: {error}; measuring anew makes it.")
        return
    for name, figure in figures.items():
        if content["config"]["dataset"] == PHOTOGRAPHS:
            _save_in_few_colours(figure, out / name)
        else:
            figure.savefig(out / name)
        yield out / name


def _save_in_few_colours(figure: "Figure", path: Path) -> None:
    """Saves a figure of photographs in 256 colours, a third of the bytes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3]).quantize(256).save(path)
