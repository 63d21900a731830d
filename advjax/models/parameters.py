"""Saves and loads parameters."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import safetensors.flax
from flax import traverse_util
from jaxtyping import Array, PyTree

from advjax import files


def save(
    path: str | os.PathLike[str],
    params: PyTree[Array],
    *,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write parameters to one safetensors file, atomically.

    Safetensors rather than Orbax: these networks are small, and one plain file is easier to keep
    and to share than a directory. NumPy and PyTorch can read it too, and reading it runs no code.

    Args:
        path: The file to write or replace.
        params: Nested dicts of arrays, as made by `init` of a Flax Linen module. An array is named
            by its keys: "params/hidden1/kernel".
        metadata: Strings to store with them, for example how the network was trained. Read them
            with `safetensors.safe_open(path, "numpy").metadata()`.

    Raises:
        ValueError: If `params` is not made of nested dicts whose keys are strings without "/".
    """
    flat = {_name(keys): leaf for keys, leaf in jax.tree.leaves_with_path(params)}
    data = safetensors.flax.save(flat, metadata=dict(metadata) if metadata else None)
    files.write_whole(Path(path), lambda file: file.write_bytes(data))


def load(path: str | os.PathLike[str]) -> PyTree[Array]:
    """Read the parameters that `save` wrote.

    Args:
        path: A safetensors file.

    Returns:
        Nested dicts of arrays with the dtypes that were saved; without `jax_enable_x64`, JAX
        converts 64 bits to 32.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is not a complete safetensors file.
    """
    try:
        flat = safetensors.flax.load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"path: {os.fspath(path)} is not a complete safetensors file ({error}); save it again."
        ) from error
    return traverse_util.unflatten_dict(flat, sep="/")


def _name(keys: tuple[Any, ...]) -> str:
    names: list[Any] = [getattr(key, "key", None) for key in keys]  # None for lists and tuples
    if not names or not all(isinstance(name, str) and "/" not in name for name in names):
        raise ValueError(
            f"params: an array at {jax.tree_util.keystr(keys) or 'the root'}, expected nested "
            'dicts whose keys are strings without "/"; convert the containers or rename the keys.'
        )
    return "/".join(names)
