"""Finished images on disk, so that a run can be killed at any moment and resumed."""

import dataclasses
import json
import time
import types
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Bool, Int

from advjax.attacks import Attack, AttackResult
from advjax.files import digest, write_whole

_FORMAT = 1  # of the files; raise it when their fields change, so that older ones are refused
_SECONDS = 1.0  # between two writes: the work that a kill can cost
_MANIFEST = "run.json"


class Checkpoint:
    """A directory of finished images: `run.json` identifies the run, each npz holds some images.

    Files are written atomically. A file that is damaged nevertheless is skipped, and its images are
    attacked again.
    """

    def __init__(self, directory: Path, run: dict[str, Any]) -> None:
        """Open the directory, or make it; ValueError if it holds another run."""
        self._directory = directory
        self._pending: list[tuple[np.ndarray, AttackResult]] = []
        self._written = time.monotonic()
        directory.mkdir(parents=True, exist_ok=True)
        manifest = directory / _MANIFEST
        if manifest.exists() or any(directory.glob("*.npz")):
            _compare(manifest, run)
        else:
            text = json.dumps(run, indent=2)
            write_whole(manifest, lambda file: file.write_text(text, encoding="utf-8"))

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        self._flush()

    def restore(self, results: AttackResult) -> Int[np.ndarray, " k"]:
        """Fill in the results of finished images, and return the indices of these images."""
        restored = [np.zeros(0, np.int64)]
        for path in sorted(self._directory.glob("*.npz")):
            try:
                restored.append(_read(path, results))
            except Exception as error:  # damage can make the reader raise anything
                warnings.warn(
                    f"{path} is damaged ({error}); its images are attacked again.", stacklevel=3
                )
        return np.unique(np.concatenate(restored))

    def add(self, images: Int[np.ndarray, " k"], results: AttackResult) -> None:
        """Add finished images, and write all that are pending if a second has passed."""
        self._pending.append((images, results))
        if time.monotonic() - self._written > _SECONDS:
            self._flush()

    def _flush(self) -> None:
        if not self._pending:
            return
        images, results = jax.tree.map(lambda *some: np.concatenate(some), *self._pending)
        # Named by its first image: files have no image in common, except with a damaged file, which
        # the new one may thus replace.
        path = self._directory / f"{images.min():09d}.npz"
        write_whole(path, lambda file: np.savez(file, images=images, **results._asdict()))
        self._pending, self._written = [], time.monotonic()


def fingerprint(attack: Attack, xs: np.ndarray, targets: np.ndarray) -> dict[str, Any]:
    """Identify a run, in parts that can be compared one by one in an error message.

    The program's text stands for the model, the attack and their options. It also differs between
    versions of JAX.
    """

    def one_step(attack: Attack, x: Array, target: Array) -> tuple[Bool[Array, ""], AttackResult]:
        state = attack.step(attack.init(x, target))
        return attack.done(state), attack.result(state)

    # Lowered for shapes alone, as the run may be resumed on other devices.
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), attack)
    text = jax.jit(one_step).lower(shapes, xs[0], targets[0]).as_text() if len(xs) else ""
    return {
        "format": _FORMAT,
        "jax": jax.__version__,
        "attack": _options(attack.method),
        "program": digest(text),
        "parameters": digest(*jax.tree.leaves(attack)),
        "xs": f"{xs.dtype} {xs.shape} {digest(xs)}",
        "targets": f"{targets.shape} {digest(targets)}",
    }


def _options(method: Any) -> dict[str, Any]:
    """The numbers and names among the options of a method; functions show in the program's text."""
    options: dict[str, Any] = {"method": type(method).__name__}
    for field in dataclasses.fields(method) if dataclasses.is_dataclass(method) else ():
        value = getattr(method, field.name)
        if dataclasses.is_dataclass(value):
            options[field.name] = _options(value)
        elif isinstance(value, bool | int | float | str | None):
            options[field.name] = value
    return options


def _compare(manifest: Path, run: dict[str, Any]) -> None:
    try:
        other = dict(json.loads(manifest.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"directory: {manifest} is missing or damaged ({error}), expected a description of the "
            "run that the results beside it belong to; remove the directory or name another."
        ) from None
    differences = [
        f"{name} is {other.get(name)!r} there and {value!r} here"
        for name, value in json.loads(json.dumps(run)).items()
        if other.get(name) != value
    ]
    if differences:
        raise ValueError(
            f"directory: {manifest.parent} holds another run: {'; '.join(differences)}. "
            "Name another directory, or remove this one."
        )


def _read(path: Path, results: AttackResult) -> np.ndarray:
    with path.open("rb") as file, np.load(file) as contents:
        images = contents["images"]
        # NumPy saves bfloat16 as raw bytes, without the dtype's name.
        found = [contents[name].view(field.dtype) for name, field in results._asdict().items()]
    for field, values in zip(results, found, strict=True):
        field[images] = values
    return images
