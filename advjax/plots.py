"""Draws finished results as Matplotlib figures.

Each function returns a `matplotlib.figure.Figure` that is independent of pyplot and its global
state; save it with `figure.savefig("name.png")`. Images are placed on whole pixels at the figure's
own resolution, so that every pixel of a small image is a sharp square.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from jax.typing import ArrayLike

from advjax import metrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DPI = 100
_CELL = 112  # pixels on the longer side of an image
_GAP = 2
_TITLE = 24
_MARGIN = 8


def adversarial_grid(
    images: ArrayLike,
    xs_adv: ArrayLike,
    *,
    labels: Iterable[object] | None = None,
    predictions: Iterable[object] | None = None,
    magnify: float = 2.0,
) -> "Figure":
    """Draw adversarial images below the originals, with the differences in between.

    Each image has a column, with its class before and after in the title, and the distortion, the
    RMS over its pixels, at the bottom. Differences are multiplied by `magnify` and shifted to the
    middle of the scale, as in the paper; for grey images, white is no difference, red is brighter
    and blue is darker.

    Args:
        images: The originals, with pixels in [0, 1]: `(n, height, width)`, `(n, height, width, 1)`
            or, in RGB, `(n, height, width, 3)`.
        xs_adv: The adversarial images, of the same shape.
        labels: The class of each original, an integer or a name.
        predictions: The class that the model predicts for each adversarial image.
        magnify: Factor of the differences.

    Returns:
        A figure, slightly wider than `112 * n` pixels.

    Raises:
        ValueError: If a shape is wrong, or there is not one label or prediction per image.
        ImportError: If Matplotlib is not installed.

    Reference: Szegedy et al. (2013), figures 5 and 7.
    """
    images, xs_adv = _image_pair("xs_adv", images, xs_adv)
    n = len(images)
    titles = [" → ".join(map(str, names)) for names in _columns(n, labels, predictions)]
    rms = jax.vmap(metrics.distortion)(images, xs_adv)
    rows = {
        "original": images,
        f"difference\n× {magnify:g}": np.clip(0.5 + magnify * (xs_adv - images), 0, 1),  # noqa: RUF001
        "adversarial": np.clip(xs_adv, 0, 1),
    }
    colormaps = ["gray", "RdBu_r", "gray"]

    side = 88
    height, width = _cell(images, _CELL)
    top = _TITLE if any(titles) else _MARGIN
    sheet = _Sheet.empty(
        side + n * (width + _GAP),
        top + 3 * (height + _GAP) - _GAP + _TITLE,
    )
    for i, (name, row) in enumerate(rows.items()):
        y = top + i * (height + _GAP)
        sheet.text(side - 6, y + height / 2, name, ha="right")
        for j, image in enumerate(row):
            sheet.image(side + j * (width + _GAP), y, image, (height, width), colormaps[i])
    for j, title in enumerate(titles):
        middle = side + j * (width + _GAP) + width / 2
        sheet.text(middle, top / 2, title, size=11)
        sheet.text(middle, sheet.height - _TITLE / 2, f"{rms[j]:.3g}", color="0.35")
    sheet.text(side - 6, sheet.height - _TITLE / 2, "RMS", ha="right", color="0.35")
    return sheet.figure


def distorted_pairs(
    panels: Sequence[tuple[str, ArrayLike, ArrayLike]],
    *,
    pairs_per_row: int = 2,
) -> "Figure":
    """Draw panels side by side, each of originals with their distorted images to the right.

    Args:
        panels: For each panel a title, the originals and the distorted images, of shapes as in
            `adversarial_grid`; all panels have the same shape. Pixels are clipped to [0, 1].
        pairs_per_row: Number of pairs in a row of a panel.

    Returns:
        A figure.

    Raises:
        ValueError: If a shape is wrong, or there are no panels.
        ImportError: If Matplotlib is not installed.

    Reference: Szegedy et al. (2013), figure 7.
    """
    checked = [(title, *_image_pair("distorted", *pair)) for title, *pair in panels]
    if not checked or any(images.shape != checked[0][1].shape for _, images, _ in checked):
        shapes = [images.shape for _, images, _ in checked]
        raise ValueError(f"panels: images of shapes {shapes}, expected panels of one shape.")
    first = checked[0][1]
    height, width = _cell(first, _CELL // 2)
    between = 28
    columns = 2 * pairs_per_row
    rows = -(-len(first) // pairs_per_row)
    panel_width = columns * (width + _GAP) - _GAP
    top = 2 * _TITLE
    sheet = _Sheet.empty(
        2 * _MARGIN + len(checked) * (panel_width + between) - between,
        top + rows * (height + _GAP) - _GAP + _MARGIN,
    )
    for p, (title, images, distorted) in enumerate(checked):
        left = _MARGIN + p * (panel_width + between)
        sheet.text(left + panel_width / 2, top / 2, title)
        for i, pair in enumerate(zip(images, distorted, strict=True)):
            row, column = divmod(i, pairs_per_row)
            for k, image in enumerate(pair):
                x = left + (2 * column + k) * (width + _GAP)
                y = top + row * (height + _GAP)
                sheet.image(x, y, np.clip(image, 0, 1), (height, width), "gray")
    return sheet.figure


def top_images_grid(
    images: ArrayLike,
    indices: ArrayLike,
    *,
    names: Iterable[object] | None = None,
) -> "Figure":
    """Draw the images with the largest scores for each direction, one row per direction.

    Args:
        images: All images, of shapes as in `adversarial_grid`.
        indices: The indices of the images to draw for each direction, `(m, k)`, as in
            `units.TopImages`.
        names: The name of each direction, drawn to the left of its row.

    Returns:
        A figure.

    Raises:
        ValueError: If a shape is wrong, an index is out of range, or there is not one name per
            direction.
        ImportError: If Matplotlib is not installed.

    Reference: Szegedy et al. (2013), figures 1 to 4.
    """
    images, indices = _images(images), np.asarray(indices)
    if indices.ndim != 2 or not indices.size or indices.min() < 0 or indices.max() >= len(images):
        raise ValueError(
            f"indices: shape {indices.shape}, expected one row per direction of indices into the "
            f"{len(images)} images."
        )
    titles = [""] * len(indices) if names is None else list(map(str, names))
    if len(titles) != len(indices):
        raise ValueError(
            f"names: {len(titles)} for {len(indices)} directions, expected one per direction."
        )
    height, width = _cell(images, _CELL // 2)
    side = 88 if any(titles) else _MARGIN
    sheet = _Sheet.empty(
        side + indices.shape[1] * (width + _GAP) - _GAP + _MARGIN,
        2 * _MARGIN + len(indices) * (height + _GAP) - _GAP,
    )
    for i, (title, row) in enumerate(zip(titles, indices, strict=True)):
        y = _MARGIN + i * (height + _GAP)
        sheet.text(side - 6, y + height / 2, title, ha="right")
        for j, index in enumerate(row):
            x = side + j * (width + _GAP)
            sheet.image(x, y, np.clip(images[index], 0, 1), (height, width), "gray")
    return sheet.figure


class _Sheet(NamedTuple):
    """A figure with coordinates in pixels from the top left."""

    figure: "Figure"
    width: int
    height: int

    @classmethod
    def empty(cls, width: int, height: int) -> "_Sheet":
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError(
                "advjax.plots needs Matplotlib; pip install 'advjax[experiments]'."
            ) from error
        figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI, facecolor="white")
        return cls(figure, width, height)

    def image(
        self, x: float, y: float, image: np.ndarray, cell: tuple[int, int], colormap: str
    ) -> None:
        height, width = cell
        left, bottom = x / self.width, 1 - (y + height) / self.height
        axes = self.figure.add_axes((left, bottom, width / self.width, height / self.height))
        axes.imshow(image, cmap=colormap, vmin=0, vmax=1, interpolation="nearest", aspect="auto")
        axes.set_axis_off()

    def text(
        self, x: float, y: float, text: str, *, ha: str = "center", size: float = 10, **style: Any
    ) -> None:
        self.figure.text(
            x / self.width,
            1 - y / self.height,
            text,
            ha=ha,
            va="center",
            size=size,
            **style,
        )


def _image_pair(name: str, images: Any, others: Any) -> tuple[np.ndarray, np.ndarray]:
    """Both in the form of `_images`; ValueError unless they have the same shape."""
    images, others = np.asarray(images), np.asarray(others)
    drawable = _images(images)
    if others.shape != images.shape:
        raise ValueError(
            f"{name}: shape {others.shape}, expected {images.shape}, the shape of images."
        )
    return drawable, others.reshape(drawable.shape)


def _images(images: Any) -> np.ndarray:
    """The images as `(n, height, width)`, or `(n, height, width, 3)` in RGB."""
    images = np.asarray(images)
    grey = images.ndim == 3 or (images.ndim == 4 and images.shape[-1] == 1)
    rgb = images.ndim == 4 and images.shape[-1] == 3
    if images.size == 0 or not (grey or rgb):
        raise ValueError(
            f"images: shape {images.shape}, expected (n, height, width), (n, height, width, 1) or "
            "(n, height, width, 3), and at least one image; for one image pass image[None]."
        )
    return images.reshape(images.shape[:3]) if grey else images


def _columns(
    n: int, labels: Iterable[object] | None, predictions: Iterable[object] | None
) -> list[tuple[object, ...]]:
    given = {"labels": labels, "predictions": predictions}
    columns = {name: list(column) for name, column in given.items() if column is not None}
    for name, column in columns.items():
        if len(column) != n:
            raise ValueError(f"{name}: {len(column)} for {n} images, expected one per image.")
    return list(zip(*columns.values(), strict=True)) if columns else [()] * n


def _cell(images: np.ndarray, longest: int) -> tuple[int, int]:
    """The height and width of drawn images, in pixels: a multiple of their own, if they fit."""
    height, width = images.shape[1:3]
    scale = longest / max(height, width)
    scale = int(scale) if scale >= 1 else scale
    return round(height * scale), round(width * scale)
