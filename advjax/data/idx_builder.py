"""MNIST and Fashion-MNIST of tensorflow-datasets, prepared and read without TensorFlow.

The builders are those of tensorflow-datasets, with just the steps that take TensorFlow replaced
(unpacking, reading the idx files, encoding PNG), so that the examples, their order and the
metadata are the same. Import this module late: tensorflow-datasets is an optional dependency.
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
    """The steps of the builder of MNIST which upstream does with TensorFlow."""

    def _split_generators(self, dl_manager: Any) -> list[Any]:
        # gzip reads the files as they are, so download them and leave them packed.
        as_they_are = types.SimpleNamespace(download_and_extract=dl_manager.download)
        return super()._split_generators(as_they_are)  # type: ignore[misc]

    def _generate_examples(
        self, num_examples: int, data_path: os.PathLike[str], label_path: os.PathLike[str]
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        images = _read_idx(data_path, (num_examples, 28, 28))
        labels = _read_idx(label_path, (num_examples,))
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            yield index, {"image": Image.fromarray(image), "label": int(label)}


with tfds.core.registered.skip_registration():
    # `__module__` stays upstream's: it is written into the metadata, and the checksums of the
    # downloads are looked up beside it.

    class MNIST(_GzippedIdx, mnist.MNIST):
        """MNIST, as upstream."""

        __module__ = mnist.__name__

    class FashionMNIST(_GzippedIdx, mnist.FashionMNIST):
        """Fashion-MNIST, as upstream."""

        __module__ = mnist.__name__


BUILDERS = {cls.name: cls for cls in (MNIST, FashionMNIST)}


def prepared(name: str, data_dir: str | os.PathLike[str] | None) -> tfds.core.DatasetBuilder:
    """Returns the builder of a data set, downloading and preparing the data if needed.

    Args:
      name: A name of BUILDERS.
      data_dir: As in tensorflow-datasets.

    Raises:
      OSError: The data are not prepared, and cannot be; without a network within seconds.
    """
    builder = BUILDERS[name](data_dir=data_dir)
    if builder.is_prepared():
        return builder
    try:
        # Without a network the download would go on trying for minutes.
        _probe(builder.URL + "t10k-labels-idx1-ubyte.gz")
        builder.download_and_prepare(file_format="array_record")
    except (OSError, tfds.download.DownloadError, NonMatchingChecksumError) as error:
        embedded = ', or use source="embedded", a sample of MNIST' if name == "mnist" else ""
        raise FileNotFoundError(
            f"{name} is not prepared in {builder.data_dir}, and cannot be now ({error}). "
            f'Run advjax.data.load("{name}", "train") on a machine with a network, copy its '
            "~/tensorflow_datasets here, and give the copy as data_dir or in TFDS_DATA_DIR"
            f"{embedded}."
        ) from None
    return builder


def read(
    builder: tfds.core.DatasetBuilder, split: str
) -> tuple[UInt8[np.ndarray, "n 28 28 1"], UInt8[np.ndarray, " n"]]:
    """Decodes all images and labels of a split, in the order in which they are stored."""
    try:
        examples = builder.as_data_source(split)
    except NotImplementedError as error:  # prepared, but as TFRecord
        raise OSError(f"{builder.name} cannot be read without TensorFlow: {error}") from error
    examples = examples.__getitems__(range(len(examples)))  # one read, not one per example
    images = np.stack([example["image"] for example in examples])
    return images, np.array([example["label"] for example in examples], np.uint8)


def fingerprint(builder: tfds.core.DatasetBuilder, split: str) -> str:
    """Returns a hash of the files in which a split is stored."""
    return files.digest(*map(Path, builder.info.splits[split].filepaths))


def _read_idx(path: os.PathLike[str], shape: tuple[int, ...]) -> UInt8[np.ndarray, "..."]:
    """Reads a gzipped idx file: a magic number and the shape, 4 bytes each, then the bytes."""
    with gzip.open(path) as file:
        contents = np.frombuffer(file.read(), np.uint8)
    return contents[-math.prod(shape) :].reshape(shape)


def _probe(url: str) -> None:
    """Raises OSError unless `url` answers one request in time."""
    answers: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()

    def ask() -> None:
        request = urllib.request.Request(url, method="HEAD")
        try:
            urllib.request.urlopen(request, timeout=PROBE_SECONDS).close()
        except (OSError, http.client.HTTPException) as error:
            answers.put(error)
        else:
            answers.put(None)

    # In a thread, as no time-out of a socket covers the look-up of the host's name.
    threading.Thread(target=ask, daemon=True).start()
    try:
        error = answers.get(timeout=PROBE_SECONDS)
    except queue.Empty:
        raise OSError(f"no answer from {url} within {PROBE_SECONDS:g} s") from None
    if error is not None:
        raise OSError(f"{url}: {error}")
