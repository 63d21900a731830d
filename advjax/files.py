"""Files that are there as a whole or not at all, and digests that tell contents apart."""

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Writes or replaces a file in one step: nobody reads half of it, no crash leaves half of it.

    Args:
        path: The file; its folder must be there.
        write: Writes the contents to the path that it is given. If it raises, there is nothing new.
    """
    with tempfile.TemporaryDirectory(dir=path.parent) as directory:
        unfinished = Path(directory) / path.name
        write(unfinished)
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        unfinished.replace(path)


def digest(*contents: Any) -> str:
    """Hash what defines a result, so that a change of any of it is noticed.

    Args:
        *contents: Strings; paths, of which the contents count and not the names; and arrays, PRNG
            keys and bfloat16 among them, with their shapes and dtypes.

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
