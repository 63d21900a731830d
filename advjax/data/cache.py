"""Caches decoded images and labels on disk."""

import contextlib
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from advjax import files

Examples = tuple[UInt8[np.ndarray, "n h w c"], UInt8[np.ndarray, " n"]]


def folder() -> Path:
    """This library's folder in the user's cache."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "advjax"


def arrays(filename: str, build: Callable[[], Examples]) -> Examples:
    """Read images and labels from the cache; build and write them if they are missing.

    Args:
        filename: The name of the file, an npz; it must identify the contents.
        build: Makes the images and labels.

    Returns:
        The images and the labels. A damaged file, which the checksums in an npz reveal, is
        rebuilt.
    """
    path = folder() / filename
    # A damaged file can make the reader raise anything; a missing file is the usual case.
    with contextlib.suppress(Exception):
        return _read(path)
    images, labels = build()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_whole(path, lambda file: np.savez(file, images=images, labels=labels))
    except OSError as error:
        warnings.warn(f"The decoded images were not cached in {path}: {error}", stacklevel=2)
    return images, labels


def _read(path: Path) -> Examples:
    with path.open("rb") as file, np.load(file) as contents:
        images, labels = contents["images"], contents["labels"]
    if not (images.dtype == labels.dtype == np.uint8 and images.shape[:1] == labels.shape):
        raise ValueError(f"{path} does not hold images and labels")
    return images, labels
