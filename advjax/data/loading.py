"""Loads a data set as arrays, from tensorflow-datasets or from the sample in the package."""

import importlib.resources
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple, get_args

import numpy as np
from jaxtyping import Float, Int, UInt8

from advjax.data import cache

Name = Literal["mnist", "fashion_mnist"]
Split = Literal["train", "test"]
Source = Literal["auto", "tfds", "embedded"]


class Dataset(NamedTuple):
    """Images with their labels.

    Attributes:
        images: The images, floating in [0, 1].
        labels: The class of each image.
        source: Where they were read from.
    """

    images: Float[np.ndarray, "n height width channels"]
    labels: Int[np.ndarray, " n"]
    source: str


def load(
    name: Name,
    split: Split,
    *,
    source: Source = "auto",
    data_dir: str | os.PathLike[str] | None = None,
) -> Dataset:
    """Load one split of MNIST or Fashion-MNIST as NumPy arrays.

    Args:
        name: The data set, "mnist" or "fashion_mnist".
        split: "train" (60,000 images) or "test" (10,000 images).
        source: "tfds" reads data prepared by tensorflow-datasets, and otherwise downloads and
            prepares them; TensorFlow is not needed. "embedded" is a sample of MNIST in the package,
            with 500 training and 100 test images of each digit. "auto" is "tfds" if possible, and
            otherwise "embedded", with a warning.
        data_dir: The folder of tensorflow-datasets; by default its own, TFDS_DATA_DIR or
            ~/tensorflow_datasets.

    Returns:
        Images `(n, 28, 28, 1)`, float32 in [0, 1]; labels `(n,)`, int32 in [0, 9]; and the source,
        "tfds" or "embedded". The order is that of tensorflow-datasets, in which classes are mixed.

    Raises:
        ValueError: If `name`, `split` or `source` is unknown, or the data set is not embedded.
        ImportError: If tensorflow-datasets is needed and not installed.
        OSError: If the data are not prepared and the server does not answer within seconds.
    """
    _check("name", name, get_args(Name))
    _check("split", split, get_args(Split))
    _check("source", source, get_args(Source))
    if source == "embedded":
        return _from_sample(name, split)
    try:
        return _from_tfds(name, split, data_dir)
    except (ImportError, OSError) as error:
        if source == "tfds" or name != "mnist":
            raise
        warnings.warn(
            f"Loading the sample of MNIST in the package instead of the full data set: {error}",
            stacklevel=2,
        )
        return _from_sample(name, split)


def _check(argument: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"{argument}: {value!r}, expected one of {', '.join(known)}.")


def _to_dataset(
    images: UInt8[np.ndarray, "n 28 28 1"], labels: UInt8[np.ndarray, " n"], source: str
) -> Dataset:
    return Dataset(images / np.float32(255), labels.astype(np.int32), source)


def _from_sample(name: str, split: str) -> Dataset:
    if name != "mnist":
        raise ValueError(
            f'name: {name!r} is not embedded, expected mnist; load it with source="tfds".'
        )
    resource = importlib.resources.files("advjax.data") / "mnist_sample.npz"
    with resource.open("rb") as file, np.load(file) as sample:
        return _to_dataset(sample[f"{split}_images"], sample[f"{split}_labels"], "embedded")


def _from_tfds(name: str, split: str, data_dir: str | os.PathLike[str] | None) -> Dataset:
    try:
        from advjax.data import tfds_mnist
    except ImportError as error:
        raise ImportError(
            f'{name} is read with tensorflow-datasets; pip install "advjax[experiments]" ({error}).'
        ) from error

    with absl_errors_only():
        builder = tfds_mnist.prepared(name, tfds_folder(data_dir))
        images, labels = cache.arrays(
            f"{name}-{split}-{builder.version}-{tfds_mnist.fingerprint(builder, split)}.npz",
            lambda: tfds_mnist.read(builder, split),
        )
    return _to_dataset(images, labels, "tfds")


def tfds_folder(data_dir: str | os.PathLike[str] | None) -> str | None:
    """The folder of tensorflow-datasets, if one is given."""
    # tensorflow-datasets reads the variable too, but only once, when it is imported.
    data_dir = data_dir or os.environ.get("TFDS_DATA_DIR")
    return os.path.expanduser(data_dir) if data_dir else None


@contextmanager
def absl_errors_only() -> Iterator[None]:
    """Mute warnings that tensorflow-datasets logs about cases that are handled here."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
