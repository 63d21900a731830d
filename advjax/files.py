"""Files that are there as a whole or not at all."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


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
