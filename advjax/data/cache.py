"""Images and labels, decoded once and kept on disk."""

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
    """The folder of this library in the user's cache."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "advjax"


def arrays(filename: str, build: Callable[[], Examples]) -> Examples:
    """Reads images and labels from the cache, building and writing them if they are not there.

    Args:
      filename: Names the file, an npz, and must identify the contents.
      build: Makes the images and labels.

    Returns:
      The images and the labels. A damaged file is built anew: the checksums in an npz tell.
    """
    path = folder() / filename
    # Damage can make the reader raise anything; a file that is not there is the usual case.
    with contextlib.suppress(Exception):
        return _read(path)
    images, labels = build()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_whole(path, lambda file: np.savez(file, images=images, labels=labels))
    except OSError as error:
        warnings.warn(f"could not cache the decoded images in {path}: {error}", stacklevel=2)
    return images, labels


def _read(path: Path) -> Examples:
    with path.open("rb") as file, np.load(file) as contents:
        images, labels = contents["images"], contents["labels"]
    if not (images.dtype == labels.dtype == np.uint8 and images.shape[:1] == labels.shape):
        raise ValueError(f"{path} holds something else")
    return images, labels
