"""Writes images as PNG files, which load back as the same arrays."""

import os
from pathlib import Path

import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float, UInt8

from advjax import checks, files
from advjax.data.photographs import is_image
from advjax.types import Box

_TOP = 255
_SLACK = 1e-3  # of the step from one value to the next: rounding, not another image
_CHANNELS = (1, 3)
_DIGITS = 4  # in the names of files, or more


def save_images(
    directory: str | os.PathLike[str],
    images: Float[ArrayLike, "n height width channels"],
    *,
    box: Box | tuple[ArrayLike, ArrayLike] = Box(),  # noqa: B008 an immutable default
    round_pixels: bool = False,
) -> list[Path]:
    """Write images as PNG files of 8 bits, without loss.

    `load_photographs(folder=directory, size=None)` reads them back, in the same order: bit for bit
    as they were, if they lie on the grid of `attacks.quantized` in the box [0, 1]. So do grids of
    fewer levels if `levels - 1` divides 255, such as those of 2, 4, 16 and 52 levels.

    Args:
        directory: Where to write; it is made if need be. The files are named by the indices of
            their images, `0000.png` and so on.
        images: The images, floating, with 1 channel (grey) or 3 (red, green, blue).
        box: `(lower, upper)`: what black and white are, each broadcast to an image.
        round_pixels: Whether to write the nearest of the 256 values for each pixel. Otherwise an
            image with other values is refused, as rounding can take it out of its class.

    Returns:
        The paths of the files, in the order of the images.

    Raises:
        TypeError: If the images are not floating.
        ValueError: If they are not of that shape, lie outside the box, are not finite, or are not
            on the grid of 256 values between its bounds.
        FileExistsError: If the directory has images already, beside those that are replaced.
        ImportError: If Pillow is not installed.
    """
    images = np.asarray(images)
    checks.floating("images", images[:0])
    if images.ndim != 4 or images.shape[-1] not in _CHANNELS or not all(images.shape[1:]):
        raise ValueError(
            f"images: shape {images.shape}, expected (n, height, width, channels) with 1 channel "
            "or 3; give a single image the first axis by images[None]."
        )
    bounds = checks.pair("box", box)
    encoded = [_encoded(i, image, *bounds, round_pixels) for i, image in enumerate(images)]
    digits = max(_DIGITS, len(str(len(images) - 1)))
    folder = Path(directory).expanduser()
    paths = [folder / f"{i:0{digits}}.png" for i in range(len(images))]
    folder.mkdir(parents=True, exist_ok=True)
    if others := sorted({path for path in folder.rglob("*") if is_image(path)} - set(paths)):
        raise FileExistsError(
            f"directory: {folder} has other images, such as {others[0].name}, expected none, as "
            "they would be loaded with these; choose another directory or remove them."
        )
    for path, pixels in zip(paths, encoded, strict=True):
        _write(path, pixels)
    return paths


def _encoded(
    index: int,
    image: Float[np.ndarray, "height width channels"],
    lower: ArrayLike,
    upper: ArrayLike,
    round_pixels: bool,
) -> UInt8[np.ndarray, "height width channels"]:
    """The bytes of an image; ValueError if it has other values than theirs."""
    x, lower, upper = (np.asarray(array).astype(np.float64) for array in (image, lower, upper))
    width = np.broadcast_to(upper - lower, x.shape)
    if not np.all(np.isfinite(width) & (width >= 0)):
        raise ValueError("box: expected finite bounds, the lower one below the upper one.")
    place = (x - lower) / np.where(width > 0, width, 1) * _TOP
    if not np.all((place >= -_SLACK) & (place <= _TOP * (width > 0) + _SLACK)):
        raise ValueError(
            f"images: image {index} has values in [{x.min():g}, {x.max():g}], expected the box "
            f"[{lower.min():g}, {upper.max():g}]; pass the box of its pixels as box=."
        )
    code = np.rint(place)
    # The value as the image's own type rounds it: much, where that is one of half precision.
    value = (lower + width * (code / _TOP)).astype(image.dtype)
    off = (np.abs(place - code) > _SLACK) & (value != image)
    if not round_pixels and np.any(off):
        raise ValueError(
            f"images: {np.count_nonzero(off):,} of the {off.size:,} values of image {index} are "
            "not among the 256 that a file of 8 bits holds, and rounding them can take the image "
            "out of its class; attack with attacks.quantized(attack), or pass round_pixels=True."
        )
    return np.clip(code, 0, _TOP).astype(np.uint8)


def _write(path: Path, pixels: UInt8[np.ndarray, "height width channels"]) -> None:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(
            f'images are written with Pillow; pip install "advjax[experiments]" ({error}).'
        ) from error
    image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    files.write_whole(path, lambda file: image.save(file, format="PNG"))
