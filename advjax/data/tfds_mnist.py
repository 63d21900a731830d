"""Prepares and reads MNIST and Fashion-MNIST of tensorflow-datasets without TensorFlow.

The builders are those of tensorflow-datasets, except for the steps that need TensorFlow
(decompression, reading idx files, encoding PNG), so that the examples, their order and the metadata
are the same. Import this module late: tensorflow-datasets is an optional dependency.
"""

import gzip
import http.client
import math
import os
import queue
import threading
import types
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import UInt8
from PIL import Image
from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError
from tensorflow_datasets.image_classification import mnist

from advjax import files

PROBE_SECONDS = 3.0


class _GzippedIdx:
    """The steps of the MNIST builder for which tensorflow-datasets uses TensorFlow."""

    def _split_generators(self, dl_manager: Any) -> list[Any]:
        # gzip reads compressed files, so that they need not be extracted.
        manager = types.SimpleNamespace(download_and_extract=dl_manager.download)
        return super()._split_generators(manager)  # type: ignore[misc]

    def _generate_examples(
        self, num_examples: int, data_path: os.PathLike[str], label_path: os.PathLike[str]
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        images = _read_idx(data_path, (num_examples, 28, 28))
        labels = _read_idx(label_path, (num_examples,))
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            yield index, {"image": Image.fromarray(image), "label": int(label)}


with tfds.core.registered.skip_registration():
    # `__module__` remains that of tensorflow-datasets: it is written to the metadata, and the
    # checksums of the downloads are looked up beside it.
    BUILDERS = {
        stock.name: type(stock.__name__, (_GzippedIdx, stock), {"__module__": mnist.__name__})
        for stock in (mnist.MNIST, mnist.FashionMNIST)
    }
"""The builders by their names."""


def prepared(name: str, data_dir: str | os.PathLike[str] | None) -> tfds.core.DatasetBuilder:
    """Return the builder of a data set; download and prepare the data if needed.

    Args:
        name: A key of BUILDERS.
        data_dir: The folder of tensorflow-datasets, or None for its default.

    Returns:
        The builder, with prepared data.

    Raises:
        OSError: If the data are not prepared and cannot be; without a network after seconds.
    """
    builder = BUILDERS[name](data_dir=data_dir)
    if builder.is_prepared():
        return builder
    try:
        # Without a network the download would retry for minutes.
        _probe(builder.URL + "t10k-labels-idx1-ubyte.gz")
        builder.download_and_prepare(file_format="array_record")
    except (OSError, tfds.download.DownloadError, NonMatchingChecksumError) as error:
        embedded = ', or use source="embedded", a sample of MNIST' if name == "mnist" else ""
        raise FileNotFoundError(
            f"{name} is not prepared in {builder.data_dir} and cannot be prepared now ({error}). "
            f'Run advjax.data.load("{name}", "train") on a machine with a network, copy its '
            "~/tensorflow_datasets to this machine, and pass the copy as data_dir or in "
            f"TFDS_DATA_DIR{embedded}."
        ) from None
    return builder


def read(
    builder: tfds.core.DatasetBuilder, split: str
) -> tuple[UInt8[np.ndarray, "n 28 28 1"], UInt8[np.ndarray, " n"]]:
    """Decode all images and labels of a split, in the order in which they are stored."""
    try:
        examples = builder.as_data_source(split)
    except NotImplementedError as error:  # prepared, but as TFRecord
        raise OSError(f"{builder.name} cannot be read without TensorFlow: {error}") from error
    examples = examples.__getitems__(range(len(examples)))  # one read, not one per example
    images = np.stack([example["image"] for example in examples])
    return images, np.array([example["label"] for example in examples], np.uint8)


def fingerprint(builder: tfds.core.DatasetBuilder, split: str) -> str:
    """Return a hash of the files in which a split is stored."""
    return files.digest(*map(Path, builder.info.splits[split].filepaths))


def _read_idx(path: os.PathLike[str], shape: tuple[int, ...]) -> UInt8[np.ndarray, "..."]:
    """Read a gzipped idx file: a magic number and the shape, 4 bytes each, then the pixels."""
    with gzip.open(path) as file:
        contents = np.frombuffer(file.read(), np.uint8)
    return contents[-math.prod(shape) :].reshape(shape)


def _probe(url: str) -> None:
    """Raise OSError unless `url` answers one request in time."""
    answers: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()

    def ask() -> None:
        request = urllib.request.Request(url, method="HEAD")
        try:
            urllib.request.urlopen(request, timeout=PROBE_SECONDS).close()
        except (OSError, http.client.HTTPException) as error:
            answers.put(error)
        else:
            answers.put(None)

    # In a thread, because the time-out of a socket does not cover the look-up of the host name.
    threading.Thread(target=ask, daemon=True).start()
    try:
        error = answers.get(timeout=PROBE_SECONDS)
    except queue.Empty:
        raise OSError(f"no answer from {url} within {PROBE_SECONDS:g} s") from None
    if error is not None:
        raise OSError(f"{url}: {error}")
