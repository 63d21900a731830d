"""Atomic writes of files, and digests of their contents."""

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Write or replace a file atomically: neither a reader nor a crash meets half of it.

    Args:
        path: The file; its folder must exist.
        write: Writes the contents to the path that it is given. If it raises, nothing changes.
    """
    with tempfile.TemporaryDirectory(dir=path.parent) as directory:
        unfinished = Path(directory) / path.name
        write(unfinished)
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        unfinished.replace(path)


def digest(*contents: Any) -> str:
    """Hash everything that defines a result, so that a change is noticed.

    Args:
        *contents: Strings; paths, for the contents of the files; and arrays of any dtype, PRNG keys
            included, with their shapes and dtypes.

    Returns:
        16 hexadecimal digits.
    """
    found = hashlib.sha256()
    for content in contents:
        if isinstance(content, str):
            found.update(content.encode())
        elif isinstance(content, Path):
            with content.open("rb") as file:
                found.update(hashlib.file_digest(file, "sha256").digest())
        else:
            found.update(f"{content.dtype}{content.shape}".encode())
            is_key = jax.dtypes.issubdtype(content.dtype, jax.dtypes.prng_key)
            array = np.asarray(jax.random.key_data(content) if is_key else content)
            found.update(np.ascontiguousarray(array).view(np.uint8).data)
    return found.hexdigest()[:16]
