"""Finished images on disk, such that a run can be killed at any moment and go on."""

import dataclasses
import hashlib
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
from advjax.files import write_whole

_SECONDS = 1.0  # between two writes, and so what a kill can cost
_MANIFEST = "run.json"


class Checkpoint:
    """A directory of finished images: `run.json` says of which run, each npz holds some of them.

    Every file is there as a whole or not at all. One that was damaged nevertheless is left out, and
    its images are attacked again.
    """

    def __init__(self, directory: Path, run: dict[str, Any]) -> None:
        """Opens the directory, or makes it; ValueError if it is another run's."""
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
        """Fills in what is finished; returns the indices of those images."""
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
        """Takes in finished images; writes what has come in if the last write is a while ago."""
        self._pending.append((images, results))
        if time.monotonic() - self._written > _SECONDS:
            self._flush()

    def _flush(self) -> None:
        if not self._pending:
            return
        images, results = jax.tree.map(lambda *some: np.concatenate(some), *self._pending)
        # No two files have an image in common, unless one of them is damaged and to be replaced.
        path = self._directory / f"{images.min():09d}.npz"
        write_whole(path, lambda file: np.savez(file, images=images, **results._asdict()))
        self._pending, self._written = [], time.monotonic()


def fingerprint(attack: Attack, xs: np.ndarray, targets: np.ndarray) -> dict[str, Any]:
    """What identifies a run, in parts that a reader can compare.

    The text of the program stands for the model, the attack and their options; it differs between
    versions of JAX too.
    """

    def one_step(attack: Attack, x: Array, target: Array) -> tuple[Bool[Array, ""], AttackResult]:
        state = attack.step(attack.init(x, target))
        return attack.done(state), attack.result(state)

    # Of shapes alone, as the devices may be others when the run continues.
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), attack)
    text = jax.jit(one_step).lower(shapes, xs[0], targets[0]).as_text() if len(xs) else ""
    return {
        "jax": jax.__version__,
        "attack": _options(attack.method),
        "program": hashlib.sha256(text.encode()).hexdigest()[:16],
        "parameters": _digest(*jax.tree.leaves(attack)),
        "xs": f"{xs.dtype} {xs.shape} {_digest(xs)}",
        "targets": f"{targets.shape} {_digest(targets)}",
    }


def _options(method: Any) -> dict[str, Any]:
    """The numbers and names among the options of a method; the program tells the rest apart."""
    options: dict[str, Any] = {"method": type(method).__name__}
    for field in dataclasses.fields(method) if dataclasses.is_dataclass(method) else ():
        value = getattr(method, field.name)
        if dataclasses.is_dataclass(value):
            options[field.name] = _options(value)
        elif isinstance(value, bool | int | float | str | None):
            options[field.name] = value
    return options


def _digest(*arrays: Any) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype}{array.shape}".encode())
        is_key = jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key)
        content = np.asarray(jax.random.key_data(array) if is_key else array)
        digest.update(np.ascontiguousarray(content).view(np.uint8).data)
    return digest.hexdigest()[:16]


def _compare(manifest: Path, run: dict[str, Any]) -> None:
    try:
        other = dict(json.loads(manifest.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"directory: {manifest} is missing or damaged ({error}), so that nobody can tell of "
            "which run the results beside it are; remove the directory or name another."
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
        # NumPy forgets the name of a bfloat16, though not the bits.
        found = [contents[name].view(field.dtype) for name, field in results._asdict().items()]
    for field, values in zip(results, found, strict=True):
        field[images] = values
    return images
