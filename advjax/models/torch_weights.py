"""Reads weights saved by PyTorch, without PyTorch and without running code from the file."""

import collections
import io
import math
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping, Set
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Shaped

from advjax import checks

_DTYPES = {  # the names of PyTorch's storages, and the names in safetensors
    ("DoubleStorage", "F64"): np.dtype("<f8"),
    ("FloatStorage", "F32"): np.dtype("<f4"),
    ("HalfStorage", "F16"): np.dtype("<f2"),
    ("BFloat16Storage", "BF16"): np.dtype(jnp.bfloat16),
    ("LongStorage", "I64"): np.dtype("<i8"),
    ("IntStorage", "I32"): np.dtype("<i4"),
    ("ShortStorage", "I16"): np.dtype("<i2"),
    ("CharStorage", "I8"): np.dtype("i1"),
    ("ByteStorage", "U8"): np.dtype("u1"),
    ("BoolStorage", "BOOL"): np.dtype("?"),
}
_TORCH_DTYPES = {storage: dtype for (storage, _), dtype in _DTYPES.items()}
_SAFETENSORS_DTYPES = {name: dtype for (_, name), dtype in _DTYPES.items()}

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_VERSION = 1001


def load_torch_weights(path: str | os.PathLike[str]) -> dict[str, Shaped[np.ndarray, "..."]]:
    """Read the weights of a network from a PyTorch file, as NumPy arrays by name.

    A checkpoint is untrusted input, and unpickling can run any code. The unpickler used here
    accepts what a dict of tensors consists of and refuses everything else.

    Args:
        path: A file written by `torch.save(model.state_dict(), path)`, in the current zip format or
            in the format before PyTorch 1.6, or a safetensors file. The format is recognised from
            the contents, not from the name.

    Returns:
        A writable array for each name, such as "features.0.weight", with the shape and dtype that
        were saved.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file has another format or is incomplete, or if it holds anything but a
            flat dict of tensors. The message says what was found, and where.
    """
    with Path(path).open("rb") as file:
        start = file.read(9)
        file.seek(0)
        try:
            if start[8:] == b"{":
                return _read_safetensors(file)
            if start.startswith(b"PK"):
                return _read_zip(file)
            if start.startswith(b"\x80"):  # the first byte of every pickle since protocol 2
                return _read_legacy(file)
            raise ValueError("it is not a PyTorch or safetensors file")
        except Exception as error:  # a damaged or hostile pickle can raise anything
            raise ValueError(
                f"path: {os.fspath(path)} cannot be read: {str(error) or type(error).__name__}."
            ) from error


def checked_entries(
    weights: Mapping[str, ArrayLike], expected: Set[str], *, of: str, options: str
) -> Callable[[str, tuple[int, ...]], Float[Array, "..."]]:
    """Check the names of weights, and return a function that looks up entries and checks shapes.

    Args:
        weights: Arrays by name.
        expected: The expected names.
        of: The model of the weights, for the message.
        options: The model's attributes that determine the shapes, for the message.

    Returns:
        `(name, shape) -> array`, which raises TypeError if the entry is not floating, and
        ValueError if it has another shape.

    Raises:
        ValueError: If entries are missing or unknown; the message names them.
    """
    missing, unknown = sorted(expected - weights.keys()), sorted(weights.keys() - expected)
    if missing or unknown:
        raise ValueError(
            f"weights: missing {missing}, unknown {unknown}; expected the entries of {of}."
        )

    def entry(name: str, shape: tuple[int, ...]) -> Float[Array, "..."]:
        array = checks.floating(name, weights[name])
        if array.shape != shape:
            raise ValueError(
                f"{name}: shape {array.shape}, expected {shape}; set the model's {options} as in "
                "the file."
            )
        return array

    return entry


def _read_safetensors(file: io.BufferedIOBase) -> dict[str, np.ndarray]:
    arrays = {}
    for name, entry in safetensors.deserialize(file.read()):
        if entry["dtype"] not in _SAFETENSORS_DTYPES:
            raise ValueError(f"{name!r} has the unknown dtype {entry['dtype']}")
        flat = np.frombuffer(entry["data"], _SAFETENSORS_DTYPES[entry["dtype"]])
        arrays[name] = flat.reshape(entry["shape"]).copy()
    return arrays


def _read_zip(file: io.BufferedIOBase) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(file) as archive:
        members = {info.filename: info for info in archive.infolist()}
        roots = [name.removesuffix("data.pkl") for name in members if name.endswith("/data.pkl")]
        if len(roots) != 1:
            raise ValueError("it is a zip archive without a data.pkl of PyTorch")

        def read(name: str) -> bytes:
            member = members.get(roots[0] + name)
            if member is None:
                raise ValueError(f"the archive has no {name}; it is incomplete")
            # A small compressed file could fill the memory.
            if member.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{name} is compressed, which PyTorch never does")
            return archive.read(member)

        if f"{roots[0]}byteorder" in members:
            _little_endian(read("byteorder") == b"little")
        state = _Unpickler(io.BytesIO(read("data.pkl"))).load()
        return _arrays(state, lambda storage: read(f"data/{storage.key}"))


def _read_legacy(file: io.BufferedIOBase) -> dict[str, np.ndarray]:
    header = [_Unpickler(file).load() for _ in range(3)]
    if header[:2] != [_LEGACY_MAGIC, _LEGACY_VERSION]:
        raise ValueError("it is a pickle, but not one written by PyTorch")
    _little_endian(header[2]["little_endian"])
    unpickler = _Unpickler(file)
    state = unpickler.load()
    contents = {}
    for key in _Unpickler(file).load():
        storage = unpickler.storages[key]
        (size,) = struct.unpack("<q", file.read(8))
        if size != storage.size:
            raise ValueError(f"storage {key} has {size} elements, expected {storage.size}")
        contents[key] = file.read(storage.nbytes)
    return _arrays(state, lambda storage: contents[storage.key])


def _little_endian(little: bool) -> None:
    if not little:
        raise ValueError("it was written on a big-endian machine; save it on a little-endian one")


class _Storage(NamedTuple):
    """A flat array of which tensors are views; its contents have not been read."""

    key: str
    dtype: np.dtype
    size: int

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize


class _Tensor(NamedTuple):
    """A view of a storage; offset and strides are in elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Unpickler(pickle.Unpickler):
    """Makes dicts of `_Tensor`s and plain values, and nothing else.

    A pickle can also set attributes; what `find_class` returns is therefore immutable, or created
    for each call.
    """

    def __init__(self, file: io.BufferedIOBase) -> None:
        super().__init__(file, encoding="utf-8")
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        match module, name:
            case "collections", "OrderedDict":
                return collections.OrderedDict
            case "torch._utils", "_rebuild_tensor_v2":
                return self._rebuild_tensor
            case "torch._utils", "_rebuild_parameter":
                return self._rebuild_parameter
            case "torch", storage if storage in _TORCH_DTYPES:
                return storage
        raise pickle.UnpicklingError(
            f"it contains {module}.{name}, expected only tensors; save model.state_dict(), not the "
            "model"
        )

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, size, *view = pid
        if kind != "storage" or any(view):
            raise pickle.UnpicklingError(f"it contains a storage of unknown kind, {pid!r}")
        self.storages[key] = _Storage(key, _TORCH_DTYPES[dtype], size)
        return self.storages[key]

    def _rebuild_tensor(self, storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> Any:
        return _Tensor(storage, offset, tuple(shape), tuple(strides))

    def _rebuild_parameter(self, tensor: Any, *_: Any) -> Any:
        return tensor


def _arrays(state: Any, read: Callable[[_Storage], bytes]) -> dict[str, np.ndarray]:
    """The tensors of an unpickled file as arrays; `read` returns the contents of a storage."""
    if not isinstance(state, Mapping):
        raise ValueError(f"it holds a {type(state).__name__}, expected a dict of tensors")
    arrays = {}
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, _Tensor):
            raise ValueError(
                f"its entry {name!r} is a {type(tensor).__name__}, expected a tensor; "
                "save the state_dict alone"
            )
        try:
            arrays[name] = _array(tensor, read(tensor.storage))
        except ValueError as error:
            raise ValueError(f"its entry {name!r}: {error}") from error
    return arrays


def _array(tensor: _Tensor, content: bytes) -> np.ndarray:
    storage, offset, shape, strides = tensor
    if len(content) != storage.nbytes:
        raise ValueError(
            f"its storage has {len(content)} bytes, expected {storage.nbytes}; it is incomplete"
        )
    last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    needed = max(last + 1, math.prod(shape)) if all(shape) else 0
    if min(offset, *shape, *strides, 0) < 0 or needed > storage.size:
        raise ValueError(
            f"its shape {shape} with strides {strides} and offset {offset} does not fit into a "
            f"storage of {storage.size} elements"
        )
    flat = np.frombuffer(content, storage.dtype)[offset:]
    steps = [step * storage.dtype.itemsize for step in strides]
    return np.lib.stride_tricks.as_strided(flat, shape, steps).copy()
