"""Figures hold the images they were given, sharp, and name what they show."""

import subprocess
import sys

import jax.numpy as jnp
import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from advjax import plots

GREY = (3, 28, 28, 1)


def pair(shape=GREY, size=0.1):
    rng = np.random.default_rng(0)
    images = rng.uniform(0.2, 0.8, shape).astype(np.float32)
    return images, images + np.float32(size) * rng.choice([-1, 1], shape).astype(np.float32)


def pixels(figure):
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def drawn(figure, axes):
    """The pixels of one axes, as the file will have them."""
    sheet = pixels(figure)
    box = axes.get_window_extent()
    left, right = round(box.x0), round(box.x1)
    top, bottom = len(sheet) - round(box.y1), len(sheet) - round(box.y0)
    return sheet[top:bottom, left:right]


def texts(figure):
    return [text.get_text() for text in figure.texts]


def text_fits(figure):
    pixels(figure)
    boxes = [text.get_window_extent() for text in figure.texts if text.get_text()]
    width, height = figure.get_size_inches() * figure.dpi
    return all(b.x0 >= 0 and b.y0 >= 0 and b.x1 <= width and b.y1 <= height for b in boxes)


def test_each_pixel_of_a_digit_becomes_one_sharp_square():
    images, xs_adv = pair()
    figure = plots.adversarial_grid(images, xs_adv)
    for axes, image in [(figure.axes[1], images[1]), (figure.axes[7], xs_adv[1])]:
        grey = drawn(figure, axes)[..., 0]
        assert grey.shape == (112, 112)
        blocks = grey.reshape(28, 4, 28, 4)
        np.testing.assert_array_equal(blocks.max((1, 3)), blocks.min((1, 3)))
        np.testing.assert_allclose(blocks[:, 0, :, 0], image[..., 0] * 255, atol=2)


def test_differences_are_magnified_about_the_middle_of_the_scale():
    images = np.full((1, 2, 2), 0.5)
    xs_adv = images + np.array([[0.0, 0.1], [-0.1, 0.4]])
    shown = np.asarray(
        plots.adversarial_grid(images, xs_adv, magnify=4).axes[1].images[0].get_array()
    )
    np.testing.assert_allclose(shown, [[0.5, 0.9], [0.1, 1.0]], rtol=1e-6)


def test_a_grey_difference_is_near_white_at_zero_red_where_brighter_and_blue_where_darker():
    images = np.full((1, 2, 2), 0.5)
    figure = plots.adversarial_grid(images, images + np.array([[0.0, 0.1], [-0.1, 0.0]]))
    red, green, blue = np.moveaxis(drawn(figure, figure.axes[1])[28::56, 28::56].astype(int), -1, 0)
    assert min(red[0, 0], green[0, 0], blue[0, 0]) > 240
    assert red[0, 1] > blue[0, 1] + 50
    assert blue[1, 0] > red[1, 0] + 50


def test_the_grid_tells_classes_factor_and_distortion():
    images, xs_adv = pair(size=0.123)
    figure = plots.adversarial_grid(
        images, xs_adv, labels=np.array([3, 1, 4]), predictions=jnp.array([8, 5, 9]), magnify=2.5
    )
    shown = texts(figure)
    assert [text for text in shown if "→" in text] == ["3 → 8", "1 → 5", "4 → 9"]
    assert shown.count("0.123") == 3
    assert any("2.5" in text for text in shown)


def test_labels_alone_and_names_for_classes_are_accepted():
    shown = texts(plots.adversarial_grid(*pair(), labels=["cat", "dog", "bus"]))
    assert {"cat", "dog", "bus"} < set(shown)


def test_the_text_stays_inside_the_figure():
    images, xs_adv = pair()
    classes = range(3)
    assert text_fits(plots.adversarial_grid(images, xs_adv, labels=classes, predictions=classes))
    assert text_fits(plots.distorted_pairs([("(a) for a network\nRMS 0.1", images, xs_adv)]))


def test_eight_digits_fit_a_page_of_a_thousand_pixels(tmp_path):
    figure = plots.adversarial_grid(*pair((8, 28, 28)))
    figure.savefig(tmp_path / "digits.png")
    with Image.open(tmp_path / "digits.png") as file:
        assert 900 <= file.width <= 1000
        assert 350 <= file.height <= 420


@pytest.mark.parametrize("shape", [(2, 28, 28), (2, 28, 28, 1), (2, 32, 32, 3), (1, 224, 200, 3)])
def test_grey_and_rgb_images_of_any_size_are_drawn(shape):
    images, xs_adv = pair(shape)
    figure = plots.adversarial_grid(images, xs_adv)
    assert len(figure.axes) == 3 * shape[0]
    colours = shape[1:] if shape[-1] == 3 else shape[1:3]
    assert figure.axes[0].images[0].get_array().shape == colours
    height, width = drawn(figure, figure.axes[0]).shape[:2]
    assert width / height == pytest.approx(shape[2] / shape[1], abs=0.02)


def test_originals_stand_left_of_their_distortions():
    first, second = pair((3, 28, 28)), pair((3, 28, 28), size=0.9)
    figure = plots.distorted_pairs([("one", *first), ("two", *second)], pairs_per_row=2)
    assert {"one", "two"} <= set(texts(figure))
    arrays = [np.asarray(axes.images[0].get_array()) for axes in figure.axes]
    for panel, (images, distorted) in enumerate((first, second)):
        for i in range(3):
            k = 6 * panel + 2 * i
            np.testing.assert_array_equal(arrays[k], images[i])
            np.testing.assert_array_equal(arrays[k + 1], np.clip(distorted[i], 0, 1))
            left, right = (figure.axes[j].get_position() for j in (k, k + 1))
            assert left.x1 < right.x0
            assert left.y0 == right.y0
    assert drawn(figure, figure.axes[0]).shape[:2] == (56, 56)


def test_a_batch_of_other_images_is_refused_by_name():
    images, xs_adv = pair()
    with pytest.raises(ValueError, match=r"xs_adv: shape \(2, 28, 28, 1\), expected \(3,"):
        plots.adversarial_grid(images, xs_adv[:2])
    with pytest.raises(ValueError, match=r"distorted: shape"):
        plots.distorted_pairs([("", images, xs_adv[:2])])


@pytest.mark.parametrize("shape", [(28, 28), (3, 28, 28, 2), (3, 784), (0, 28, 28)])
def test_what_is_no_batch_of_images_is_refused(shape):
    with pytest.raises(ValueError, match=r"images: shape .*expected \(n, height, width\)"):
        plots.adversarial_grid(np.zeros(shape), np.zeros(shape))


@pytest.mark.parametrize("name", ["labels", "predictions"])
def test_one_class_an_image_is_asked_for(name):
    with pytest.raises(ValueError, match=f"{name}: 2 for 3 images"):
        plots.adversarial_grid(*pair(), **{name: [1, 2]})


def test_panels_of_one_shape_are_asked_for():
    with pytest.raises(ValueError, match="panels: images of shapes"):
        plots.distorted_pairs([("", *pair()), ("", *pair((2, 28, 28)))])
    with pytest.raises(ValueError, match="panels"):
        plots.distorted_pairs([])


def test_the_module_imports_without_matplotlib_and_a_plot_asks_for_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'advjax\[experiments\]'"):
        plots.adversarial_grid(*pair())


def test_no_global_state_of_pyplot_is_touched():
    code = (
        "import sys, numpy as np; from advjax import plots\n"
        "assert 'matplotlib' not in sys.modules\n"
        "plots.adversarial_grid(np.zeros((1, 4, 4)), np.ones((1, 4, 4)))\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert matplotlib.figure.Figure is type(plots.adversarial_grid(*pair()))
